"""Fréchet distance between two sets of feature vectors, from statistics that are gathered batch by batch."""

import torch
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of vectors of width F, in float64; holds F x F numbers however many vectors there are."""

    def __init__(self, width: int):
        self.count = 0
        self.sum_F = torch.zeros(width, dtype=torch.float64)
        self.products_FF = torch.zeros(width, width, dtype=torch.float64)
        self.origin_F: Tensor | None = None

    def update(self, features_BF: Tensor) -> None:
        features_BF = features_BF.detach().double().cpu()
        if self.origin_F is None:  # sums around a typical vector lose fewer digits than sums around zero
            self.origin_F = features_BF.mean(dim=0)
        centred_BF = features_BF - self.origin_F
        self.count += len(centred_BF)
        self.sum_F += centred_BF.sum(dim=0)
        self.products_FF += centred_BF.T @ centred_BF

    @property
    def mean_F(self) -> Tensor:
        return self.origin_F + self.sum_F / self.count

    @property
    def covariance_FF(self) -> Tensor:
        """Unbiased, as numpy.cov's."""
        return (self.products_FF - torch.outer(self.sum_F, self.sum_F) / self.count) / (self.count - 1)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(x: FeatureStatistics, y: FeatureStatistics) -> float:
    """|mean_x - mean_y|^2 + Tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of the Gaussians that fit both sets.

    The trace is taken over the eigenvalues of C_x^(1/2) C_y C_x^(1/2), which are C_x C_y's: symmetric matrices stay
    exact where there are fewer vectors than features. ValueError for fewer than two vectors.
    """
    if min(x.count, y.count) < 2:
        raise ValueError(f"a Fréchet distance takes two vectors of each set at least, not {x.count} and {y.count}")
    root = _root(x.covariance_FF)
    product = root @ y.covariance_FF @ root
    roots_trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    traces = x.covariance_FF.trace() + y.covariance_FF.trace()
    return ((x.mean_F - y.mean_F).square().sum() + traces - 2 * roots_trace).item()
