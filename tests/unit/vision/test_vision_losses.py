"""LPIPS, GAN losses and metrics."""

import pickle

import pytest
import torch
from torch.nn import functional as F

from megadual.vision.discriminator import Discriminator
from megadual.vision.losses import adaptive_weight, discriminator_loss
from megadual.vision.lpips import LPIPS, load_arrays
from megadual.vision.metrics import perplexity, psnr, retrieval_r1, ssim


@pytest.fixture(scope="module")
def picture():
    """A smooth picture with edges, (1, 3, 64, 64)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    rings = torch.sin(6 * (x**2 + y**2))
    return torch.stack([rings, (x > 0.2).float() * 2 - 1, x * y])[None]


def test_lpips_is_zero_for_the_same_and_orders_shift_and_noise(picture):
    lpips = LPIPS()
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    same, shifted, noisy = lpips(
        torch.cat([picture, picture.roll(1, dims=3), (picture + noise).clamp(-1, 1)]), picture.expand(3, -1, -1, -1)
    )
    assert same == 0
    assert 0 < shifted < noisy
    assert not any(p.requires_grad for p in lpips.parameters())


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


def test_psnr_and_ssim_of_known_pairs(picture):
    assert psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.2)).item() == pytest.approx(20.0, abs=1e-4)
    assert ssim(picture, picture).item() == pytest.approx(1.0)
    blurred = F.avg_pool2d(picture, 9, 1, 4)
    assert ssim(blurred, picture) < 0.95


def test_retrieval_counts_equal_captions_as_hits():
    images = torch.eye(3)
    texts = torch.eye(3)[[0, 2, 1]]
    assert retrieval_r1(images, texts, ["a", "b", "c"]) == pytest.approx(1 / 3)
    assert retrieval_r1(images, texts, ["a", "b", "b"]) == 1


def test_perplexity_is_the_number_of_evenly_used_codes():
    assert perplexity(torch.tensor([5.0, 5.0, 5.0, 5.0, 0.0])) == pytest.approx(4)
