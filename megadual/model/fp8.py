"""The transformer's linear layers in FP8: all three of their products, forward E4M3, gradients E5M2.

Every tensor has one scale, made from the tensor itself: there is no history, so a resumed run goes on bitwise. Products
sum in fp32 and give what the layer had given; gradients of weights are added to fp32 `main_grad` unrounded. Weights
stay what they were and are cast once a step. Norms, attention, embeddings, heads and losses know nothing of it.

Under tensor parallelism activations of the sequence-parallel ranks are gathered in FP8. A weight has the scale of all
ranks' shares of it, an activation that is split between them one on each.

Shape suffixes: R rows (positions), I and O widths in and out, C columns.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megadual.errors import UserError
from megadual.model.main_grad import added, has_main_grad

try:
    from megadual.kernels import fp8_cast as kernel
except ImportError:  # no Triton here
    kernel = None

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 1e-30  # scale: zeros stay zeros


def check_device() -> None:
    """UserError on a GPU that multiplies no FP8."""
    if torch.cuda.is_available() and (at := torch.cuda.get_device_capability()) < (8, 9):
        name, version = torch.cuda.get_device_name(), ".".join(map(str, at))
        raise UserError(f"train.fp8=true needs a GPU of compute capability 8.9 or newer; {name} has {version}")


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What to divide by, so that `largest` becomes the largest number of `dtype`; fp32."""
    return (largest.float() / torch.finfo(dtype).max).clamp(min=SMALLEST)


def largest_of(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, float("inf"))


def cast(
    x_RC: Tensor, scale: Tensor, dtype: torch.dtype, along: bool = True, across: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """(R, C) and (C, R) of x / scale in `dtype`, whichever of them are asked for."""
    if kernel and x_RC.is_cuda:
        return kernel.cast(x_RC, scale, dtype, along, across)
    most = torch.finfo(dtype).max
    x8_RC = (x_RC.float() / scale).clamp(-most, most).to(dtype)
    return (x8_RC if along else None), (x8_RC.view(torch.uint8).T.contiguous().view(dtype) if across else None)


def product(a_RC: Tensor, b_OC: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    """(R, O) a @ b.T of FP8 matrices; `exact` sums in fp32 throughout, which gradients need."""
    return torch._scaled_mm(
        a_RC, b_OC.T, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=not exact and a_RC.is_cuda
    )


class Weight:
    """A linear layer's weight in FP8, along and across, and the layer's product with it."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter
        self.scale: Tensor | None = None
        self.along_OI: Tensor | None = None
        self.across_IO: Tensor | None = None

    def multiply(
        self, x: Tensor, bias_O: Tensor | None, reduce: bool = False, gather: bool = False, group=None
    ) -> Tensor:
        """x (..., I) @ weight.T + bias.

        Over tensor-parallel ranks of `group`: `reduce` sums x's gradient, `gather` brings the rows of all together
        first, and deals the gradient's out again.
        """
        return _Linear.apply(x, self.parameter, bias_O, self, has_main_grad(self.parameter), reduce, gather, group)


@torch.no_grad()
def update(weights: list[Weight], group: dist.ProcessGroup) -> None:
    """Cast all weights, after they have changed. Collective over the tensor-parallel `group`."""
    if not weights:
        return
    largest = torch.stack([largest_of(weight.parameter).float() for weight in weights])
    if group.size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    for weight, most in zip(weights, largest, strict=True):
        weight.scale = scale_of(most, FORWARD)
        weight.along_OI, weight.across_IO = cast(weight.parameter, weight.scale, FORWARD)


def _gathered(x8_RC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks. FP8 travels as bytes, which every backend takes."""
    all_RC = x8_RC.new_empty(group.size() * len(x8_RC), x8_RC.size(1))
    dist.all_gather_into_tensor(all_RC.view(torch.uint8), x8_RC.view(torch.uint8), group=group)
    return all_RC


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_OI, bias_O, held: Weight, sums: bool, reduce: bool, gather: bool, group):
        ctx.held, ctx.sums, ctx.reduce, ctx.gather, ctx.group = held, sums, reduce, gather, group
        ctx.shape, ctx.dtype, ctx.weight, ctx.biased = x.shape, x.dtype, weight_OI, bias_O is not None
        x_RI, largest = x.flatten(0, -2), largest_of(x)
        trained = weight_OI.requires_grad
        if gather:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        x_scale = scale_of(largest, FORWARD)
        x8_RI, x8_IR = cast(x_RI, x_scale, FORWARD, across=trained and not gather)
        # what the weight's gradient needs: where rows were gathered, they are again
        ctx.save_for_backward((x8_RI if gather else x8_IR) if trained else None, x_scale)
        if gather:
            x8_RI = _gathered(x8_RI, group)
        y_RO = product(x8_RI, held.along_OI, x_scale, held.scale, x.dtype, exact=False)
        if bias_O is not None:
            y_RO += bias_O
        return y_RO.view(-1, *x.shape[1:-1], y_RO.size(1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        saved, x_scale = ctx.saved_tensors
        weight, group, held = ctx.weight, ctx.group, ctx.held
        upstream_RO = upstream.flatten(0, -2)
        scale = scale_of(largest_of(upstream_RO), GRADIENT)
        g8_RO, g8_OR = cast(upstream_RO, scale, GRADIENT, across=saved is not None)
        work, x_gradient = None, None
        if ctx.needs_input_grad[0]:
            x_gradient = product(g8_RO, held.across_IO, scale, held.scale, ctx.dtype, exact=True)
            if ctx.gather:
                own = x_gradient.new_empty(len(x_gradient) // group.size(), x_gradient.size(1))
                work = dist.reduce_scatter_tensor(own, x_gradient, group=group, async_op=True)
                x_gradient = own
            elif ctx.reduce:
                work = dist.all_reduce(x_gradient, group=group, async_op=True)
            x_gradient = x_gradient.view(ctx.shape)
        weight_gradient = None
        if saved is not None:
            x8_IR = _gathered(saved, group).view(torch.uint8).T.contiguous().view(FORWARD) if ctx.gather else saved
            dtype = weight.main_grad.dtype if ctx.sums else weight.dtype
            weight_gradient = product(g8_OR, x8_IR, scale, x_scale, dtype, exact=True)
            if ctx.sums:
                weight.main_grad.add_(weight_gradient)
                weight_gradient = added(weight)
        bias_gradient = upstream_RO.sum(0) if ctx.biased else None
        if work:
            work.wait()
        return x_gradient, weight_gradient, bias_gradient, None, None, None, None, None
