"""Weight gradients summed in fp32 by whatever makes them, instead of made in bf16, stored, read and added.

megatron-core's data parallelism holds the sum of a parameter's gradients over a step's micro-batches in `main_grad`,
and adds to it each `grad` that backward leaves, unless `grad_added_to_main_grad` says that this was done. Parameters
without these two, of another engine or a model by itself, get their gradients from autograd as usual.

Shape suffixes: R rows, I and O widths in and out, K table rows, H their width.
"""

import torch
import torch.nn.functional as F
from torch import nn


def has_main_grad(parameter: torch.Tensor) -> bool:
    """Whether backward is to add to the parameter's `main_grad`; else it returns its gradient."""
    return parameter.requires_grad and torch.is_grad_enabled() and hasattr(parameter, "grad_added_to_main_grad")


def added(parameter: torch.Tensor) -> torch.Tensor:
    """Note that the gradient has been added; returns what backward gives autograd in its place, for hooks to be run."""
    parameter.grad_added_to_main_grad = True
    return torch.empty_like(parameter)  # never read


def add_product(main_grad_OI: torch.Tensor, upstream_RO: torch.Tensor, x_RI: torch.Tensor) -> None:
    """main_grad += upstream.T @ x; on a GPU the product of bf16 itself sums in fp32, so nothing is rounded."""
    if x_RI.is_cuda and x_RI.dtype != main_grad_OI.dtype:
        torch.addmm(main_grad_OI, upstream_RO.t(), x_RI, out_dtype=main_grad_OI.dtype, out=main_grad_OI)
    else:
        main_grad_OI.add_(upstream_RO.t() @ x_RI)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_OI, bias_O):
        ctx.save_for_backward(x)
        ctx.weight = weight_OI  # itself, with its main_grad: where x is made again, what is saved is made anew
        ctx.biased = bias_O is not None
        return F.linear(x, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (x,), weight_OI = ctx.saved_tensors, ctx.weight
        x_gradient = upstream @ weight_OI if ctx.needs_input_grad[0] else None
        upstream_RO = upstream.flatten(0, -2)
        add_product(weight_OI.main_grad, upstream_RO, x.flatten(0, -2))
        return x_gradient, added(weight_OI), upstream_RO.sum(0) if ctx.biased else None


class Linear(nn.Linear):
    """torch's, whose weight's gradient goes to `main_grad` where there is one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if has_main_grad(self.weight):
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table_KH, ids_R, counts_R):
        ctx.save_for_backward(table_KH, ids_R, counts_R)
        return F.embedding(ids_R, table_KH)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream_RH):
        table_KH, ids_R, counts_R = ctx.saved_tensors
        # What does not count has a gradient of zero. Spread over the table, it is not summed up into one row by row.
        spread_R = torch.arange(len(ids_R), device=ids_R.device) % len(table_KH)
        rows_R = torch.where(counts_R, ids_R, spread_R)
        gradient_RH = upstream_RH.to(table_KH.main_grad.dtype)
        table_KH.main_grad.index_put_((rows_R,), gradient_RH, accumulate=True)  # sorted first: the same every time
        return added(table_KH), None, None


def lookup(table_KH: torch.Tensor, ids_R: torch.Tensor, counts_R: torch.Tensor) -> torch.Tensor:
    """(R, H) rows of a table. Where `counts_R` is false the result must not matter: its gradient is zero."""
    if has_main_grad(table_KH):
        return _Lookup.apply(table_KH, ids_R, counts_R)
    return F.embedding(ids_R, table_KH)
