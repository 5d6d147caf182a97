"""Residual vector quantisation with EMA codebooks, as a rule one for all depths (paper sections A2 and A3).

Shape suffixes: B batch, N positions, M = B * N, C code width, D depth, K codebook size.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

try:  # PyTorch for the CPU comes without Triton, and a folder that carries this file alone has no kernels
    from megadual.kernels import nearest_code as kernel
except ImportError:
    kernel = None

SCORES_AT_ONCE = 2**24  # numbers in one (rows, K) block of the nearest-code search: 64 MiB


def nearest_code(x_MC: Tensor, codebook_KC: Tensor) -> Tensor:
    """Index of the nearest code (L2) of each row, (M,) int64; the (M, K) distances are never held whole."""
    if kernel is not None and kernel.supports(x_MC, codebook_KC):
        return kernel.residual_codes(x_MC, codebook_KC, depth=1)[:, 0]
    return plain_nearest_code(x_MC, codebook_KC)


def residual_codes(x_MC: Tensor, codebook: Tensor, depth: int) -> Tensor:
    """Codes (M, D) int64: at each depth the nearest code to what the depths before left of a row.

    `codebook` is (K, C), or (D, K, C) where each depth has its own.
    """
    if codebook.ndim == 2 and kernel is not None and kernel.supports(x_MC, codebook):
        return kernel.residual_codes(x_MC, codebook, depth)
    codes = []
    for codebook_KC in codebook if codebook.ndim == 3 else [codebook] * depth:
        codes.append(nearest_code(x_MC, codebook_KC))
        x_MC = x_MC - codebook_KC[codes[-1]]
    return torch.stack(codes, dim=1)


def sum_of_codes(codebook: Tensor, codes: Tensor) -> Tensor:
    """Sum over depths of code vectors: codebook (K, C) or (D, K, C), codes (..., D) ints -> (..., C)."""
    if codebook.ndim == 2:
        return codebook[codes].sum(dim=-2)
    return codebook[torch.arange(len(codebook), device=codebook.device), codes].sum(dim=-2)


def plain_nearest_code(x_MC: Tensor, codebook_KC: Tensor) -> Tensor:
    """`nearest_code` in PyTorch's own operations, on any device."""
    half_norms_K = codebook_KC.square().sum(dim=1) / 2
    rows = max(1, SCORES_AT_ONCE // len(codebook_KC))
    # |x|^2 is the same for all codes of a row, so it is left out.
    blocks = [torch.addmm(half_norms_K, x, codebook_KC.T, alpha=-1).argmin(dim=1) for x in x_MC.split(rows)]
    return torch.cat(blocks)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


class Codebook(nn.Embedding):
    """K code vectors and one padding row, moved by exponential moving averages and not by gradients.

    Statistics are summed over the ranks of the default process group, so all ranks hold the same codes.
    """

    def __init__(self, codebook_size: int, dim: int, decay: float, restart_unused_codes: bool):
        super().__init__(codebook_size + 1, dim, padding_idx=codebook_size)
        self.weight.requires_grad_(False)
        self.decay, self.restart_unused_codes = decay, restart_unused_codes
        self.register_buffer("cluster_size_ema", torch.ones(codebook_size))
        self.register_buffer("embed_ema", self.codes.clone())
        self.register_buffer("restarted", torch.zeros((), dtype=torch.int64), persistent=False)  # since it was built

    @property
    def codes(self) -> Tensor:
        """The code vectors (K, C), without the padding row."""
        return self.weight[:-1]

    @torch.no_grad()
    def update(self, x_MC: Tensor, codes_M: Tensor) -> None:
        """Move the codes towards the rows assigned to them; restart those that fewer than one row a step uses."""
        K = len(self.codes)
        # One tensor for vector sums and counts, so that one all-reduce does.
        stats = x_MC.new_zeros(K, x_MC.shape[1] + 1)
        stats[:, :-1].index_add_(0, codes_M, x_MC)
        stats[:, -1] = torch.bincount(codes_M, minlength=K)
        if _distributed():
            dist.all_reduce(stats)
        self.embed_ema.mul_(self.decay).add_(stats[:, :-1], alpha=1 - self.decay)
        self.cluster_size_ema.mul_(self.decay).add_(stats[:, -1], alpha=1 - self.decay)
        if self.restart_unused_codes:
            self._restart(x_MC)
        # Laplace smoothing keeps the quotient finite for codes that are hardly used.
        total, epsilon = self.cluster_size_ema.sum(), 1e-5
        size_K = (self.cluster_size_ema + epsilon) / (total + K * epsilon) * total
        self.weight[:-1] = self.embed_ema / size_K[:, None]

    def _restart(self, x_MC: Tensor) -> None:
        K, M = len(self.codes), len(x_MC)
        # Drawn on the host, whose generator checkpoints hold, whatever the device.
        rows = torch.randperm(M)[: min(K, M)].to(x_MC.device)
        vectors_KC = x_MC[rows].repeat(-(-K // M), 1)[:K].contiguous()
        if M < K:  # a code beside its twin would never be chosen
            vectors_KC += torch.randn(vectors_KC.shape).to(vectors_KC) * (0.01 * x_MC.std() + 1e-6)
        if _distributed():
            dist.broadcast(vectors_KC, src=0)
        unused_K = self.cluster_size_ema < 1
        self.embed_ema[:] = torch.where(unused_K[:, None], vectors_KC, self.embed_ema)
        self.cluster_size_ema.masked_fill_(unused_K, 1.0)
        self.restarted += unused_K.sum()


class ResidualQuantizer(nn.Module):
    """Quantises vectors to D codes each; the sum of their code vectors approximates the vector.

    timing "per_depth": the codebook moves after each depth, so the next depth searches moved codes.
    timing "per_step": all depths search one snapshot, and one update follows them.
    `shared`: one codebook for all depths, as a rule. All arithmetic is fp32 with autocast off: bf16 distances would
    pick other codes than inference does.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        depth: int,
        decay: float,
        restart_unused_codes: bool,
        timing: str,
        shared: bool = True,
    ):
        super().__init__()
        self.depth, self.dim, self.timing, self.shared = depth, dim, timing, shared
        new = lambda: Codebook(codebook_size, dim, decay, restart_unused_codes)
        # One codebook under D names is the layout of the published weights.
        self.codebooks = nn.ModuleList([new()] * depth if shared else [new() for _ in range(depth)])

    @property
    def codebook(self) -> Codebook:
        """The one codebook of all depths."""
        assert self.shared
        return self.codebooks[0]

    @property
    def by_depth(self) -> list[Codebook]:
        """The codebook of each depth; an exported model holds a shared one under its first name alone."""
        return [self.codebook] * self.depth if self.shared else list(self.codebooks)

    @property
    def codes(self) -> Tensor:
        """The code vectors (K, C), or (D, K, C) where each depth has its own."""
        return self.codebook.codes if self.shared else torch.stack([codebook.codes for codebook in self.codebooks])

    @property
    def restarted(self) -> int:
        """Codes restarted since the quantiser was built."""
        return sum(int(codebook.restarted) for codebook in set(self.codebooks))

    def forward(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (quantised (B, N, C) with straight-through gradient, codes (B, N, D) int64, commitment loss).

        In training mode the codebook is updated.
        """
        with torch.autocast(x_BNC.device.type, enabled=False):
            x_MC = x_BNC.float().flatten(0, 1)
            residual_MC = x_MC.detach()
            quantized_MC = torch.zeros_like(residual_MC)
            residuals, codes, commitments = [], [], []
            for codebook in self.by_depth:
                codes_M = nearest_code(residual_MC, codebook.codes)
                vectors_MC = codebook(codes_M)
                residuals.append(residual_MC)
                codes.append(codes_M)
                if self.training and self.timing == "per_depth":
                    codebook.update(residual_MC, codes_M)
                residual_MC = residual_MC - vectors_MC
                quantized_MC = quantized_MC + vectors_MC
                commitments.append(F.mse_loss(x_MC, quantized_MC))
            if self.training and self.timing == "per_step":
                self._update_once(residuals, codes)
            # x - x.detach() is exactly 0 and carries the gradient: the value stays the sum of code vectors.
            quantized_BNC = (quantized_MC + (x_MC - x_MC.detach())).view_as(x_BNC)
            codes_BND = torch.stack(codes, dim=-1).view(*x_BNC.shape[:-1], self.depth)
            return quantized_BNC, codes_BND, torch.stack(commitments).mean()

    def _update_once(self, residuals: list[Tensor], codes: list[Tensor]) -> None:
        if self.shared:
            self.codebook.update(torch.cat(residuals), torch.cat(codes))
            return
        for codebook, residual_MC, codes_M in zip(self.codebooks, residuals, codes, strict=True):
            codebook.update(residual_MC, codes_M)

    def embed(self, codes: Tensor) -> Tensor:
        """Sum over depths of the code vectors: (..., D) ints -> (..., C)."""
        quantized = torch.zeros(*codes.shape[:-1], self.dim, device=codes.device)
        for depth, codebook in enumerate(self.by_depth):  # in the order of forward: the sums are bitwise equal
            quantized = quantized + codebook(codes[..., depth])
        return quantized
