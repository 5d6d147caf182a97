"""The losses of tokenizer training (paper section A4)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megadual.keys import key

from .tokenizer import DualTokenOutput

COMMIT = "commit_"  # with a stream's name behind it, its commitment loss


@dataclass
class LossWeights:
    """The defaults are the published script's, stage 1; a stage is a set of weights and of frozen modules.

    Features are what enters the layers behind the codes, pooled is the image embedding at their end: both are compared
    with the teacher's.
    """

    feature_mse: float = key(5.0, "MSE of what enters the layers behind the codes, from the teacher's", least=0)
    feature_cos: float = key(5.0, "their cosine distance", least=0)
    pooled_mse: float = key(1.0, "MSE of the image embedding, from the teacher's", least=0)
    pooled_cos: float = key(1.0, "its cosine distance", least=0)
    commit: dict[str, float] = key({}, "a stream's commitment to its codes; 5 where not named", least=0)
    reconstruction: float = key(5.0, "MSE of the pixels", least=0)
    lpips: float = key(1.0, "perceptual distance", least=0)
    gan: float = key(0.75, "the discriminator's loss, times an adaptive weight", least=0)

    def of(self, term: str) -> float:
        """The weight of one of the terms that training names."""
        if term.startswith(COMMIT):
            return self.commit.get(term.removeprefix(COMMIT), 5.0)
        return getattr(self, term)


def distillation(
    output: DualTokenOutput, images: Tensor, teacher_features: Tensor | None, teacher_pooled: Tensor | None
) -> dict[str, Tensor]:
    """The unweighted terms that need neither LPIPS nor the discriminator, by name.

    teacher_features (B, N, E) is the teacher's input of the layer behind the codes, teacher_pooled (B, P); both are
    read only where a stream feeds the teacher.
    """
    terms = {}
    if output.features is not None:
        terms["feature_mse"] = F.mse_loss(output.features, teacher_features)
        terms["feature_cos"] = -F.cosine_similarity(output.features, teacher_features, dim=-1).mean()
        terms["pooled_mse"] = F.mse_loss(output.pooled, teacher_pooled)
        terms["pooled_cos"] = -F.cosine_similarity(output.pooled, teacher_pooled, dim=-1).mean()
    terms |= {f"{COMMIT}{stream}": loss for stream, loss in output.commitments.items()}
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
