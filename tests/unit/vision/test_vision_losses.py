"""Weights of LPIPS, GAN losses and metrics; image metrics have tests/parity/test_image_metrics.py."""

import pickle

import pytest
import torch

from megadual.vision.discriminator import Discriminator
from megadual.vision.losses import adaptive_weight, discriminator_loss
from megadual.vision.lpips import LPIPS, load_arrays
from megadual.vision.metrics import perplexity, retrieval_r1


def test_lpips_is_frozen():
    assert not any(p.requires_grad for p in LPIPS().parameters())


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_the_weight_reader_refuses_code(tmp_path):
    (tmp_path / "evil").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match="print"):
        load_arrays(tmp_path / "evil")


def test_adaptive_weight_is_the_clamped_ratio_of_gradients():
    weight = torch.ones(3, requires_grad=True)
    assert adaptive_weight((weight * 2).sum(), weight.sum(), weight) == pytest.approx(2, rel=1e-3)
    assert adaptive_weight((weight * 99).sum(), weight.sum(), weight) == 10
    assert adaptive_weight((weight * 0.01).sum(), weight.sum(), weight) == pytest.approx(0.3)


def test_the_discriminator_learns_to_tell_noise_from_stripes():
    torch.manual_seed(0)
    discriminator = Discriminator([8, 16, 16], groups=4)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    stripes = torch.sin(torch.arange(32.0)).expand(8, 3, 32, 32)
    for _ in range(20):
        loss = discriminator_loss(discriminator(stripes), discriminator(torch.randn_like(stripes)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert discriminator(stripes).mean() > discriminator(torch.randn_like(stripes)).mean() + 0.5
    assert discriminator(stripes).shape == (8, 1, 8, 8)


def test_retrieval_counts_equal_captions_as_hits():
    images = torch.eye(3)
    texts = torch.eye(3)[[0, 2, 1]]
    assert retrieval_r1(images, texts, ["a", "b", "c"]) == pytest.approx(1 / 3)
    assert retrieval_r1(images, texts, ["a", "b", "b"]) == 1


def test_perplexity_is_the_number_of_evenly_used_codes():
    assert perplexity(torch.tensor([5.0, 5.0, 5.0, 5.0, 0.0])) == pytest.approx(4)
