"""The losses of tokenizer training (paper section A4)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .tokenizer import DualTokenOutput


@dataclass
class LossWeights:
    """The defaults are the published script's, stage 1; a stage is a set of weights and of frozen modules."""

    semantic_mse: float = 5.0
    semantic_cos: float = 5.0
    pooled_mse: float = 1.0
    pooled_cos: float = 1.0
    commit_semantic: float = 5.0
    commit_pixel: float = 5.0
    reconstruction: float = 5.0
    lpips: float = 1.0
    gan: float = 0.75


def distillation(
    output: DualTokenOutput, images: Tensor, teacher_sem: Tensor, teacher_pooled: Tensor
) -> dict[str, Tensor]:
    """The unweighted terms that need neither LPIPS nor the discriminator.

    teacher_sem (B, N, E) is the teacher's input of the layer behind the semantic one, teacher_pooled (B, P).
    """
    terms = {
        "semantic_mse": F.mse_loss(output.zq_sem, teacher_sem),
        "semantic_cos": -F.cosine_similarity(output.zq_sem, teacher_sem, dim=-1).mean(),
        "pooled_mse": F.mse_loss(output.pooled, teacher_pooled),
        "pooled_cos": -F.cosine_similarity(output.pooled, teacher_pooled, dim=-1).mean(),
        "commit_semantic": output.commit_sem,
        "commit_pixel": output.commit_pix,
    }
    if output.reconstruction is not None:
        terms["reconstruction"] = F.mse_loss(output.reconstruction, images)
    return terms


def generator_loss(fake_scores: Tensor) -> Tensor:
    return -fake_scores.mean()


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """The hinge loss in its leaky form: scores beyond the margin keep a small gradient."""
    return (F.leaky_relu(1 - real_scores).mean() + F.leaky_relu(1 + fake_scores).mean()) / 2


def adaptive_weight(fidelity: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """How much the adversarial loss counts: the ratio of both gradients at the decoder's last layer, in [0.3, 10]."""
    (wanted,) = torch.autograd.grad(fidelity, last_weight, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last_weight, retain_graph=True)
    return (wanted.norm() / (given.norm() + 1e-4)).clamp(0.3, 10.0).detach()
