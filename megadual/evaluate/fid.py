"""The Fréchet distance between drawn pictures and real ones, as MJHQ-30K's FID.

`python -m megadual.evaluate fid --images OUT/images --reference MJHQ --output OUT/fid.json`

FID by clean-fid's resizing and Inception-v3 where its weights are (--inception); elsewhere a distance on EfficientNet's
features under its own name. The file says library, weights, resizing and the formats of both sides: JPEG on one side
alone shifts FID.
"""

import argparse
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from megadual.errors import UserError
from megadual.evaluate.record import file_sha256, now, software, write_json
from megadual.vision.eval.frechet import FeatureStatistics, frechet_distance
from megadual.vision.eval.image_features import feature_network
from megadual.vision.tokenizer import centre_crop, to_rgb

BATCH = 32
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def find_images(option: str, folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise UserError(f"{option} '{folder}' holds {len(files)} images ({', '.join(SUFFIXES)}); at least 2 are needed")
    return files


def statistics(network, files: list[Path], size: int | None, progress: str) -> tuple[FeatureStatistics, dict]:
    """Of all images' features; and how many there are of each format and size."""
    gathered, formats, sizes = FeatureStatistics(network.width), Counter(), Counter()
    with tqdm(total=len(files), desc=progress, unit="image", mininterval=1) as bar:
        for start in range(0, len(files), BATCH):
            images = []
            for path in files[start : start + BATCH]:
                with Image.open(path) as image:
                    formats[image.format] += 1
                    sizes[f"{image.width} x {image.height}"] += 1
                    images.append(np.asarray(centre_crop(image, size) if size else to_rgb(image)))
            for _, alike in groupby(images, key=lambda image: image.shape):
                gathered.update(network(np.stack(list(alike))))
            bar.update(len(images))
    return gathered, {"images": len(files), "formats": dict(formats), "sizes": dict(sizes.most_common(3))}


def fid(images: Path, reference: Path, inception: Path | None, size: int | None, device: str) -> dict:
    drawn, real = find_images("--images", images), find_images("--reference", reference)
    network, why_not = feature_network(inception, size or Image.open(drawn[0]).width, torch.device(device))
    ours, about_drawn = statistics(network, drawn, size, "drawn")
    theirs, about_real = statistics(network, real, size, "reference")
    before = f"shortest side to {size} px (PIL, bicubic), central square; then " if size else ""
    return {
        "benchmark": "mjhq-fid",
        "measure": "fid" if network.key == "rfid" else network.key,
        "value": frechet_distance(ours, theirs),
        "features": network.about,
        "not_fid_because": why_not,
        "resizing": f"{before}as the features' network resizes",
        "inception_sha256": file_sha256(inception) if inception else None,
        "drawn": {"path": str(images), **about_drawn},
        "reference": {"path": str(reference), **about_real},
        "time": now(),
        "software": software(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, type=Path, help="folder of drawn pictures, read with all below it")
    parser.add_argument("--reference", required=True, type=Path, help="folder of real ones, likewise")
    parser.add_argument("--output", required=True, type=Path, help="the JSON file to write")
    parser.add_argument("--inception", type=Path, help="clean-fid's Inception file (default: where clean-fid keeps it)")
    parser.add_argument("--size", type=int, help="bring both sides to so many pixels first (default: as they are)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> None:
    found = fid(args.images, args.reference, args.inception, args.size, args.device)
    write_json(args.output, found)
    sides = ", ".join(
        f"{found[side]['images']} {side} ({'/'.join(found[side]['formats'])})" for side in ("drawn", "reference")
    )
    print(f"{found['measure']} {found['value']:.4g}: {sides}; {found['features']}; {args.output}")
