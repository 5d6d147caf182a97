"""A small detector of drawings, trained on composed scenes alone: what lies where in a picture of a scene.

`python -m megadual.evaluate train-detector --output detector.pt`

It says what drawings a picture shows, where their centres are, and what colour the ground has, so that pictures that a
model draws can be scored. It learns on new scenes at every step, blurred and with noise, since decoded pictures are.

Shape suffixes: B images, G cells of the grid along a side, K kinds of drawings.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from megadual.errors import UserError
from megadual.evaluate.held_out import Trained
from megadual.synthetic.drawings import GROUNDS, check_packages
from megadual.synthetic.scenes import Scene, draw_scene, render

GRID = 16  # no two drawings of a scene have their centres within two cells of each other
SIDES = (64, 128)  # pixels that it looks at; larger pictures are reduced


@dataclass(frozen=True)
class Found:
    """A drawing in a picture; its centre as shares of the sides."""

    name: str
    x: float
    y: float
    sure: float


@dataclass(frozen=True)
class Seen:
    """What a picture shows."""

    ground: str
    found: list[Found]

    def of(self, name: str) -> list[Found]:
        return [each for each in self.found if each.name == name]

    @property
    def counts(self) -> dict[str, int]:
        return {each.name: len(self.of(each.name)) for each in self.found}


def ground_of(image: Image.Image) -> str:
    """The ground whose colour is nearest to the median of the picture's border."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    rim = max(1, len(pixels) // 32)
    mask = np.ones(pixels.shape[:2], bool)
    mask[rim:-rim, rim:-rim] = False
    middle = np.median(pixels[mask], axis=0)
    colours = {name: np.array(list(bytes.fromhex(code[1:])), np.float32) for name, code in GROUNDS.items()}
    return min(colours, key=lambda name: float(np.square(colours[name] - middle).sum()))


class Block(nn.Module):
    """Two convolutions beside what they are given, reduced by `stride`."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.beside = nn.Conv2d(inner, outer, stride, stride, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outer) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(inside + self.norms[2](self.beside(x)))


class Detector(nn.Module):
    """For each of GRID x GRID cells: whether a drawing's centre is there, where in it, and of which kind."""

    def __init__(self, names: list[str], side: int, width: int = 32):
        super().__init__()
        self.names, self.side, self.width = list(names), side, width
        widths = [width * 2**i for i in range((side // GRID).bit_length() - 1)]
        self.down = nn.Sequential(*(Block(a, b, 2) for a, b in zip([3, *widths], widths, strict=False)))
        last = widths[-1]
        self.deeper = nn.Sequential(Block(last, 2 * last, 2), Block(2 * last, 2 * last, 1))
        self.together = nn.Sequential(
            nn.Conv2d(3 * last, last, 1), nn.BatchNorm2d(last), nn.ReLU(),
            nn.Conv2d(last, last, 3, 1, 1), nn.BatchNorm2d(last), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Conv2d(last, 3 + len(names), 1)
        nn.init.constant_(self.head.bias[:1], -4.0)  # few cells hold a centre

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """(B, 3 + K, G, G): logit of a centre; where it is, in cells from the cell's middle; logits of the kinds."""
        fine = self.down(images_B3SS)
        coarse = F.interpolate(self.deeper(fine), scale_factor=2, mode="nearest")
        return self.head(self.together(torch.cat([fine, coarse], dim=1)))

    @torch.no_grad()
    def see(self, images: list[Image.Image]) -> list[Seen]:
        """What pictures of any size show."""
        self.eval()
        device, seen = self.head.weight.device, []
        for start in range(0, len(images), 64):
            some = [image.convert("RGB") for image in images[start : start + 64]]
            reduced = [image.resize((self.side,) * 2, Image.Resampling.BOX) if image.width > self.side else image
                       for image in some]  # fmt: skip
            reduced = [image.resize((self.side,) * 2, Image.Resampling.BICUBIC) for image in reduced]
            outputs = self(to_tensor(np.stack([np.asarray(image) for image in reduced])).to(device)).float().cpu()
            seen += [Seen(ground_of(image), self._found(output)) for image, output in zip(some, outputs, strict=True)]
        return seen

    def _found(self, output_CGG: Tensor) -> list[Found]:
        """The cells that are surer of a centre than all around them, and surer than not."""
        sure_GG = output_CGG[0].sigmoid()
        peaks_GG = (sure_GG == F.max_pool2d(sure_GG[None], 3, 1, 1)[0]) & (sure_GG > 0.5)
        found = []
        for row, column in peaks_GG.nonzero().tolist():
            right, down = output_CGG[1:3, row, column].tolist()
            name = self.names[int(output_CGG[3:, row, column].argmax())]
            x, y = (column + 0.5 + right) / GRID, (row + 0.5 + down) / GRID
            found.append(Found(name, x, y, float(sure_GG[row, column])))
        return found

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {"names": self.names, "side": self.side, "width": self.width}
        torch.save({"settings": settings, "weights": self.state_dict()}, path)

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> "Detector":
        try:
            kept = torch.load(path, weights_only=True, map_location="cpu")
            detector = cls(**kept["settings"])
            detector.load_state_dict(kept["weights"])
        except FileNotFoundError as error:
            raise UserError(
                f"--detector '{path}' does not exist; make it with python -m megadual.evaluate train-detector"
            ) from error
        except Exception as error:  # of a file that is none of ours: whatever unpickling it leads to
            raise UserError(f"--detector '{path}' is no detector of train-detector: {error}") from error
        return detector.to(device).eval()


def to_tensor(images_BSS3: np.ndarray) -> Tensor:
    """uint8 pictures as (B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(images_BSS3).permute(0, 3, 1, 2).float() / 127.5 - 1


def worn(images_B3SS: Tensor, generator: torch.Generator) -> Tensor:
    """Half of them blurred, some much, all with noise and a little another brightness, as a decoder leaves them."""
    count, device = len(images_B3SS), images_B3SS.device

    def uniform() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator).to(device)

    images, blurred = images_B3SS, uniform()
    for factor, chosen in ((2, blurred < 0.3), (4, blurred > 0.8)):
        coarse = F.interpolate(F.avg_pool2d(images_B3SS, factor), scale_factor=factor, mode="bilinear")
        images = images + chosen * uniform() * (coarse - images)
    noise = torch.randn(images.shape, generator=generator).to(device)
    return (images * (0.9 + 0.2 * uniform()) + 0.1 * (uniform() - 0.5) + 0.1 * uniform() * noise).clamp(-1, 1)


class Scenes(IterableDataset):
    """Endless pictures of scenes with their targets: (picture, (5, G, G): weight, centre, right, down, kind)."""

    def __init__(self, trained: Trained, names: list[str], side: int, seed: int):
        self.trained, self.side, self.seed = trained, side, seed
        self.kinds = {name: number for number, name in enumerate(names)}

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        worker = get_worker_info()
        rng = random.Random(f"detector {self.seed} {worker.id if worker else 0}")
        while True:
            scene = self.trained.allowed(draw_scene, lambda scene: [scene], rng, barred=False)
            yield np.array(render(scene, self.side)), targets(scene, self.kinds)


def targets(scene: Scene, kinds: dict[str, int]) -> np.ndarray:
    """(5, G, G): how much a cell's certainty of a centre weighs, whether one is there, where it is from the cell's
    middle (in cells), and the kind; of cells around a centre the last three as well, but they need not be sure."""
    out = np.zeros((5, GRID, GRID), np.float32)
    out[0], out[4] = 1, -1
    for group in scene.groups:
        for left, top, side in group.boxes:
            x, y = (left + side / 2) * GRID, (top + side / 2) * GRID
            column, row = min(int(x), GRID - 1), min(int(y), GRID - 1)
            for r in range(max(row - 1, 0), min(row + 2, GRID)):
                for c in range(max(column - 1, 0), min(column + 2, GRID)):
                    out[:, r, c] = 0, 0, x - c - 0.5, y - r - 0.5, kinds[group.name]
            out[:2, row, column] = 1
    return out


def loss(output_BCGG: Tensor, targets_B5GG: Tensor) -> Tensor:
    weight, centre, offsets, kind = targets_B5GG.split([1, 1, 2, 1], dim=1)
    sure = F.binary_cross_entropy_with_logits(output_BCGG[:, :1], centre, reduction="none")
    sure = ((1 - torch.exp(-sure)) ** 2 * sure * weight).sum() / centre.sum()  # focal: most cells are plainly empty
    near = kind >= 0
    moved = ((output_BCGG[:, 1:3] - offsets).abs() * near).sum() / near.sum() / 2
    named = F.cross_entropy(output_BCGG[:, 3:], kind[:, 0].long(), ignore_index=-1)
    return sure + moved + named


def train(
    trained: Trained, side: int, steps: int, batch_size: int, seed: int, device: str, workers: int, lr: float = 4e-3
) -> Detector:
    torch.manual_seed(seed)
    names = sorted(trained.names)
    detector = Detector(names, side).to(device).train()
    loader = DataLoader(Scenes(trained, names, side, seed), batch_size, num_workers=workers)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=lr, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=steps, desc="detector", unit="step", mininterval=1 if sys.stderr.isatty() else 10) as bar:
        for _, (pictures, wanted) in zip(range(steps), loader, strict=False):
            images = worn(to_tensor(pictures.numpy()).to(device), generator)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                output = detector(images)
            error = loss(output.float(), wanted.to(device))
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{error.item():.3f}", refresh=False)
    return detector.eval()


def exactly_right(detector: Detector, scenes: list[Scene], size: int) -> float:
    """The share of scenes whose ground, drawings and their numbers are all seen."""
    seen = detector.see([render(scene, size) for scene in scenes])
    wanted = [(scene.ground, {group.name: group.count for group in scene.groups}) for scene in scenes]
    return sum((each.ground, each.counts) == right for each, right in zip(seen, wanted, strict=True)) / len(scenes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    parser.add_argument("--corpus", type=Path, help="know the drawings of this corpus alone (default: all)")
    parser.add_argument("--side", type=int, choices=SIDES, default=64, help="pixels that it looks at (default: 64)")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes (default: none)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> None:
    check_packages()
    trained = Trained.on(args.corpus)
    detector = train(trained, args.side, args.steps, args.batch_size, args.seed, args.device, args.workers)
    detector.save(args.output)
    share = exactly_right(detector, trained.draw("pairs", 500, f"detector held out {args.seed}"), args.side)
    print(f"{args.output}: ground, drawings and numbers all right on {share:.1%} of 500 other scenes")
