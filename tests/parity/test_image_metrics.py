"""PSNR, SSIM and LPIPS against torchmetrics, and LPIPS against a published value of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.image import lpips as reference
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from megadual.vision.lpips import BLOCKS, LPIPS
from megadual.vision.metrics import psnr, ssim


@pytest.fixture(scope="module")
def lpips():
    return LPIPS()


@pytest.fixture(scope="module")
def pairs():
    """Images in [-1, 1] and worse ones, (4, 3, 45, 64) each: noisy, blurred, shifted, another."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.randn(5, 3, 6, 8, generator=generator), (45, 64), mode="bicubic").clamp(-1, 1)
    image, other = smooth[:4], smooth[4]
    noisy = image[0] + 0.2 * torch.randn(image[0].shape, generator=generator)
    worse = torch.stack([noisy, F.avg_pool2d(image[1], 9, 1, 4), image[2].roll(3, dims=2), other])
    return image, worse.clamp(-1, 1)


def test_psnr_is_torchmetrics(pairs):
    image, worse = pairs
    expected = peak_signal_noise_ratio((worse + 1) / 2, (image + 1) / 2, 1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(worse, image), expected)
    assert psnr(image, image).tolist() == [100] * 4  # of what is equal: torchmetrics' infinity would spoil every mean


def test_ssim_is_torchmetrics_but_for_the_border(pairs):
    """torchmetrics mirrors five pixels around the image; DualToken's evaluation, and ours, leaves them out."""
    image, worse = pairs
    _, similarity = structural_similarity_index_measure(
        (worse + 1) / 2, (image + 1) / 2, data_range=1.0, return_full_image=True
    )
    expected = similarity[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    assert expected.min() < 0.5 and expected.max() > 0.6
    torch.testing.assert_close(ssim(worse, image), expected, rtol=1e-5, atol=1e-6)


def test_lpips_is_torchmetrics(lpips, pairs, monkeypatch):
    """Their code on our copy of VGG16, which they would take from torchvision; the linear heads are their own copy."""
    layers = [layer for block in lpips.blocks for layer in block]
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda net, pretrained: layers)
    image, worse = pairs
    expected = reference.learned_perceptual_image_patch_similarity(worse, image, net_type="vgg", reduction="none")
    torch.testing.assert_close(lpips(worse, image), expected, rtol=1e-4, atol=1e-6)
    assert lpips(image, image).tolist() == [0] * 4


def test_lpips_is_the_published_value(lpips):
    """The example that torchmetrics' documentation had while it called the authors' package: 0.3493.

    Its images are drawn after the network was built, whose initial values come from the same seed.
    """
    torch.manual_seed(123)
    channels = 3
    for width in sum(BLOCKS, ()):
        nn.Conv2d(channels, width, 3)
        channels = width
    nn.Linear(512 * 7 * 7, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1000)
    for block in BLOCKS:
        nn.Conv2d(block[-1], 1, 1, bias=False)
    image, other = (torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))
    assert lpips(image, other).mean().item() == pytest.approx(0.3493, abs=5e-5)
