"""Fréchet distances: the formula, the networks they are taken on, and the files that images pass."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from megadual.errors import UserError
from megadual.vision.eval.frechet import FeatureStatistics, frechet_distance
from megadual.vision.eval.image_features import (
    EfficientNetFeatures,
    InceptionFeatures,
    feature_network,
    through_files,
)


def statistics(features: np.ndarray, batch: int = 7) -> FeatureStatistics:
    gathered = FeatureStatistics(features.shape[1])
    for some in torch.from_numpy(features).float().split(batch):
        gathered.update(some)
    return gathered


def textbook_distance(x: np.ndarray, y: np.ndarray) -> float:
    """With numpy's covariance and the eigenvalues of the unsymmetric product."""
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).astype(complex))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * roots.sum().real


@pytest.mark.parametrize("count", [300, 5])  # more vectors than features, and fewer
def test_distance_is_the_textbooks_however_it_was_batched(count):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 12))
    x = (rng.normal(size=(count, 12)) @ mixing + 50).astype(np.float32)
    y = (rng.normal(size=(count, 12)) + 50.5).astype(np.float32)
    expected = textbook_distance(x.astype(np.float64), y.astype(np.float64))
    for batch in (3, 1000):
        assert frechet_distance(statistics(x, batch), statistics(y, batch)) == pytest.approx(expected, rel=1e-5)


def test_distance_of_known_gaussians():
    x = np.random.default_rng(0).normal(size=(50, 6))
    assert frechet_distance(statistics(x), statistics(x)) == pytest.approx(0, abs=1e-9)
    moved = frechet_distance(statistics(x), statistics(x + 2))
    assert moved == pytest.approx(6 * 2**2, rel=1e-5)  # equal spread: the squared shift alone
    with pytest.raises(ValueError, match="two vectors"):
        frechet_distance(statistics(x), statistics(x[:1]))


def test_images_pass_the_named_file_format():
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    png = through_files(images, "png")
    assert png.shape == (2, 24, 24, 3) and png.dtype == np.uint8
    np.testing.assert_allclose(png, ((images.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1), atol=0.5)
    file = io.BytesIO()
    Image.fromarray(png[0]).save(file, "JPEG", quality=95)
    np.testing.assert_array_equal(through_files(images, "jpeg")[0], np.asarray(Image.open(file)))


def test_efficientnet_tells_more_damage_from_less():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 4, 4, generator=generator) * 2 - 1
    images = nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    network = EfficientNetFeatures(32, torch.device("cpu"))
    assert network.side == 128

    def gathered(x: torch.Tensor) -> FeatureStatistics:
        statistics = FeatureStatistics(network.width)
        statistics.update(network(through_files(x, "png")))
        return statistics

    noise = torch.randn(images.shape, generator=generator)
    originals, slightly, badly = (gathered(images + amount * noise) for amount in (0, 0.1, 0.4))
    assert frechet_distance(originals, originals) == pytest.approx(0, abs=1e-3)
    assert 0.1 < frechet_distance(originals, slightly) < frechet_distance(originals, badly)


class InceptionShaped(nn.Module):
    """What a file of FID's Inception offers: `layers` from 299 px, scaled to [-1, 1], to 2048 features."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 2048, 13, stride=26), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.layers(x)


def test_inception_is_run_by_clean_fid_on_its_own_resizing(tmp_path):
    torch.manual_seed(0)
    module = InceptionShaped()
    torch.jit.script(module).save(str(tmp_path / "weights.pt"))
    network, why_not = feature_network(tmp_path / "weights.pt", 32, torch.device("cpu"))
    assert isinstance(network, InceptionFeatures) and why_not is None and "clean-fid 0.1" in network.about
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    resized = [
        np.stack(
            [Image.fromarray(c).resize((299, 299), Image.Resampling.BICUBIC) for c in np.float32(x).transpose(2, 0, 1)]
        )
        for x in pixels
    ]
    x = (torch.from_numpy(np.stack(resized)).clamp(0, 255) - 128) / 128
    torch.testing.assert_close(network(pixels), module.layers(x).detach())


def test_without_inception_it_says_so_and_a_named_file_must_exist(tmp_path, monkeypatch):
    monkeypatch.setattr("megadual.vision.eval.image_features.INCEPTION_CACHE", tmp_path / "none.pt")
    network, why_not = feature_network(None, 32, torch.device("cpu"))
    assert network.key == "frechet_efficientnet_lite0" and "not FID" in network.about
    assert "none.pt" in why_not and "--inception" in why_not
    with pytest.raises(UserError, match="missing.pt"):
        feature_network(tmp_path / "missing.pt", 32, torch.device("cpu"))
