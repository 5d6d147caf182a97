"""Operations whose plain form writes large intermediates: SwiGLU, rotary embedding, and an output layer with its
cross-entropy.

Shape suffixes: B output layers of one shape, P positions, K classes, W width, F feed-forward width, R rows; of
attention T positions, N heads, E head width.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megadual.model.main_grad import added

LOGITS_AT_ONCE = 1 << 28


def fused(function):
    """`function` of tensors (R, ...), compiled into few kernels where they are on a GPU.

    R may differ from call to call; the other sizes are compiled for, since kernels read aligned rows faster.
    """
    compiled = functools.cache(lambda: torch.compile(function, dynamic=False))  # takes seconds to import

    @functools.wraps(function)
    def call(*tensors: torch.Tensor):
        if not tensors[0].is_cuda:
            return function(*tensors)
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled()(*tensors)

    return call


@fused
def swiglu(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """(R, F) silu(gate) * up of the two halves."""
    gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


@fused
def rotate(x_TNE: torch.Tensor, angles_TF: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half-split: pairs (e, e + E/2) of every head turned by F = E/2 angles, in fp32."""
    cos_T1F, sin_T1F = angles_TF.cos()[:, None], angles_TF.sin()[:, None]
    a_TNF, b_TNF = x_TNE.float().chunk(2, dim=-1)
    turned = torch.cat([a_TNF * cos_T1F - b_TNF * sin_T1F, b_TNF * cos_T1F + a_TNF * sin_T1F], dim=-1)
    return turned.to(x_TNE.dtype)


@fused
def _exponential_sums(logits_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest logit and its sum of exponentials relative to that, (R,) fp32."""
    logits_RK = logits_RK.float()
    largest_R = logits_RK.amax(-1)
    return largest_R, (logits_RK - largest_R[:, None]).exp_().sum(-1)


@fused
def _logits_to_gradient(logits_RK: torch.Tensor, log_total_R: torch.Tensor, target_R: torch.Tensor) -> None:
    """Put softmax - one-hot in the logits' place; a target outside of [0, K) marks no class."""
    classes_K = torch.arange(logits_RK.size(1), device=logits_RK.device)
    softmax_RK = (logits_RK.float() - log_total_R[:, None]).exp_()
    logits_RK.copy_(softmax_RK.sub_((classes_K == target_R[:, None]).to(torch.int8)))


@fused
def _scale(x_RW: torch.Tensor, scale_R: torch.Tensor) -> None:
    """Multiply in place by fp32 numbers, which rounded to bf16 would shift all gradients alike."""
    x_RW.mul_(scale_R[:, None])


@fused
def _add_scaled(sum_RW: torch.Tensor, x_RW: torch.Tensor, scale_R: torch.Tensor) -> None:
    """Add what `_scale` makes of x to fp32 sums."""
    sum_RW.add_((x_RW * scale_R[:, None]).to(x_RW.dtype))


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, x.size(-1))


def _even_chunk(P: int, most: int) -> int:
    """Positions of a chunk, so that all chunks are about as large, in the multiples of 128 that products like."""
    if P <= most:
        return max(P, 1)
    even = -(-P // -(-P // max(most, 1)))
    return min(-(-even // 128) * 128, max(most, 1))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BPW, weight, target_BP, logits_at_once, group):
        B, P, W = x_BPW.shape
        weight_BKW = weight.view(B, -1, W)
        ctx.shape, K = weight.shape, weight_BKW.size(1)
        parts = group.size() if group else 1
        if parts > 1:
            target_BP = target_BP - group.rank() * K
        loss_B = x_BPW.new_zeros(B, dtype=torch.float32)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        x_gradient = x_BPW.new_empty(x_BPW.shape) if needs_x else None
        weight_gradient = (torch.empty_like if P else torch.zeros_like)(weight_BKW) if needs_weight else None
        chunk = _even_chunk(P, logits_at_once // (B * K))
        for start in range(0, P, chunk):
            x, target = x_BPW[:, start : start + chunk], target_BP[:, start : start + chunk].flatten()
            logits = torch.bmm(x, weight_BKW.mT)
            rows = logits.view(-1, K)
            largest, total = _exponential_sums(rows)
            inside = (target >= 0) & (target < K)
            picked = torch.where(inside, rows.gather(1, target.clamp(0, K - 1)[:, None])[:, 0].float(), 0.0)
            if parts > 1:
                largest, total, picked = _over_ranks(torch.stack([largest, total, picked]), group)
            log_total = largest + total.log()
            loss_B += (log_total - picked).view(B, -1).sum(1)
            if needs_x or needs_weight:
                _logits_to_gradient(rows, log_total, target)
            if needs_x:
                x_gradient[:, start : start + chunk] = torch.bmm(logits, weight_BKW)
            if needs_weight:
                weight_gradient.baddbmm_(logits.mT, x, beta=float(start > 0))  # beta 0 reads nothing
            del logits, rows  # before the next chunk's are made
        ctx.weight = weight if hasattr(weight, "grad_added_to_main_grad") else None
        ctx.save_for_backward(x_gradient, weight_gradient)
        return loss_B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream_B):
        x_gradient, weight_gradient = ctx.saved_tensors
        # In place: the gradients were made for this, and a graph is walked once.
        if x_gradient is not None:
            _scale(_rows(x_gradient), upstream_B.repeat_interleave(x_gradient.size(1)))
        if weight_gradient is not None:
            scale = upstream_B.repeat_interleave(weight_gradient.size(1))
            if ctx.weight is not None:
                _add_scaled(_rows(ctx.weight.main_grad), _rows(weight_gradient), scale)
                weight_gradient = added(ctx.weight)
            else:
                _scale(_rows(weight_gradient), scale)
                weight_gradient = weight_gradient.view(ctx.shape)
        return x_gradient, weight_gradient, None, None, None


def _over_ranks(own_3P: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest logit, sum of exponentials relative to it and picked logit over all ranks' classes, in one exchange."""
    all_N3P = own_3P.new_empty(group.size(), *own_3P.shape)
    dist.all_gather_into_tensor(all_N3P.flatten(0, 1), own_3P, group=group)
    largest_NP, total_NP, picked_NP = all_N3P.unbind(1)
    largest_P = largest_NP.amax(0)
    return largest_P, (total_NP * (largest_NP - largest_P).exp()).sum(0), picked_NP.sum(0)


def linear_cross_entropy(
    x_BPW: torch.Tensor,
    weight: torch.Tensor,
    target_BP: torch.Tensor,
    logits_at_once: int = LOGITS_AT_ONCE,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """(B,) summed cross-entropies, fp32, of the logits x @ weight.T over all P positions.

    The weight is (B, K, W), or of one layer (K, W): the parameter itself, whose gradient may go to `main_grad`.
    Only `logits_at_once` logits are held, and are made once: their gradients are made with them in the forward
    pass, so a graph that goes through here can be walked backward once. Where `group` is given, `weight` is
    this rank's share of the classes, x and targets are equal on all ranks, and so is the result, while x's
    gradient is this rank's part of a sum.
    """
    if not torch.is_grad_enabled():  # which a Function's forward can't see
        x_BPW, weight = x_BPW.detach(), weight.detach()
    return _LinearCrossEntropy.apply(x_BPW, weight, target_BP, logits_at_once, group)
