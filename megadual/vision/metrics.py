"""Image and retrieval metrics. Images are (B, 3, h, w) in [-1, 1]; PSNR and SSIM are computed in [0, 1]."""

import torch
from torch import Tensor
from torch.nn import functional as F


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (B,) in dB."""
    mse_B = ((x - y) / 2).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(mse_B.clamp_min(1e-10))


def ssim(x: Tensor, y: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity of each image, (B,): Gaussian window, no padding, mean over channels."""
    x, y = (x + 1) / 2, (y + 1) / 2
    offsets = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
    gauss = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = torch.outer(gauss, gauss) / gauss.sum() ** 2

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z, kernel.expand(3, 1, window, window), groups=3)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.flatten(1).mean(dim=1)


def nearest(queries_NP: Tensor, candidates_MP: Tensor, rows: int = 1024) -> list[int]:
    """The candidate of largest cosine for each query; never holds more than `rows` x M cosines."""
    candidates_MP = F.normalize(candidates_MP, dim=-1)
    best = [(F.normalize(some, dim=-1) @ candidates_MP.T).argmax(dim=1) for some in queries_NP.split(rows)]
    return torch.cat(best).tolist()


def retrieval_r1(queries_NP: Tensor, candidates_NP: Tensor, captions: list[str]) -> float:
    """Share of queries whose nearest candidate, among all N, is of their pair or of one captioned alike.

    Images and texts, or texts and images, in the order of `captions`.
    """
    best = nearest(queries_NP, candidates_NP)
    return sum(captions[i] == captions[j] for i, j in enumerate(best)) / len(captions)


def code_usage(codes: Tensor, codebook_size: int) -> float:
    """Share of a codebook's entries that occur in `codes` at any depth."""
    return codes.unique().numel() / codebook_size


def perplexity(counts_K: Tensor) -> float:
    """exp of the entropy of code counts: how many codes are used as if evenly."""
    p = counts_K[counts_K > 0] / counts_K.sum()
    return torch.exp(-(p * p.log()).sum()).item()
