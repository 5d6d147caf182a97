"""How well a DualToken reconstructs and understands held-out images.

`python -m megadual.vision.evaluate --model DIR --siglip DIR --data 'heldout-*.tar' --train-data 'train-*.tar'
--output DIR`

Writes report.json and pictures of originals beside their reconstructions, the worst first.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megadual.errors import UserError, command

from .config import STREAMS
from .data import list_shards, read_pairs
from .lpips import LPIPS
from .metrics import code_usage, psnr, retrieval_r1, ssim
from .pictures import comparison_grid
from .siglip import image_embeddings, load_siglip, load_tokenizer, text_embeddings
from .tokenizer import DualToken

PAIRS_PER_PICTURE = 64


def load_dualtoken(folder: str | Path) -> DualToken:
    try:
        return DualToken.from_pretrained(folder)
    except ValueError as error:
        raise UserError(str(error)) from error


@torch.no_grad()
def tokenize(model: DualToken, images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Codes (n, rows, columns, D) of both streams, pooled embeddings and reconstructions of all images."""
    parts = []
    for chunk in tqdm(images.split(batch_size), desc="encode and decode", unit="batch", mininterval=10):
        codes = model.encode(chunk)
        parts.append((codes.semantic, codes.pixel, codes.pooled, model.decode(codes.pixel)))
    return dict(zip(("semantic", "pixel", "pooled", "reconstruction"), map(torch.cat, zip(*parts))))


@torch.no_grad()
def evaluate(model_dir: str, siglip_dir: str, data: str, train_data: str, output: Path, batch_size: int = 64) -> dict:
    """The report: see `definitions` in it for what each number is taken over."""
    list_shards(train_data)
    model = load_dualtoken(model_dir)
    siglip, tokenizer = load_siglip(siglip_dir), load_tokenizer(siglip_dir)
    lpips = LPIPS()
    images, captions = read_pairs(data, model.config.image_size)
    train_images, _ = read_pairs(train_data, model.config.image_size)
    tokens = tokenize(model, images, batch_size)
    reconstruction = tokens["reconstruction"]

    texts = text_embeddings(siglip, tokenizer, captions)
    psnrs = psnr(reconstruction, images)
    distances = torch.cat([lpips(x, y) for x, y in zip(reconstruction.split(batch_size), images.split(batch_size))])
    report = {
        "n": len(images),
        "psnr": psnrs.mean().item(),
        "psnr_mean_image": psnr(train_images.mean(dim=0, keepdim=True).expand_as(images), images).mean().item(),
        "ssim": ssim(reconstruction, images).mean().item(),
        "lpips": distances.mean().item(),
        "retrieval_r1_teacher": retrieval_r1(image_embeddings(siglip, images), texts, captions),
        "retrieval_r1_quantized": retrieval_r1(tokens["pooled"], texts, captions),
        "chance": 1 / len(images),
        **{f"code_usage_{stream}": code_usage(tokens[stream], model.config.codebook_size) for stream in STREAMS},
        "codes_per_stream": tokens["pixel"].numel(),
        "fingerprint": model.fingerprint(),
        "definitions": {
            "psnr": "dB, per image in [0, 1], mean over the n held-out images",
            "psnr_mean_image": "the same for predicting the training images' mean for every image",
            "retrieval_r1": "image to caption among all n captions; teacher: SigLIP, quantized: through semantic codes",
            "code_usage": "share of the codebook's entries used at least once, at any depth, over all held-out images",
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    worst = psnrs.argsort()
    digits = len(str(math.ceil(len(worst) / PAIRS_PER_PICTURE) - 1))
    for i, some in enumerate(worst.split(PAIRS_PER_PICTURE)):
        grid = comparison_grid(images[some], reconstruction[some])
        grid.save(output / f"reconstructions-{i:0{digits}d}.png")
    return report


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="DualToken folder")
    parser.add_argument("--siglip", required=True, help="the teacher's folder, with its text tokenizer")
    parser.add_argument("--data", required=True, help="held-out shards, a glob pattern")
    parser.add_argument("--train-data", required=True, help="training shards, for the mean image")
    parser.add_argument("--output", required=True, help="folder for report.json and pictures")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args(argv)
    report = evaluate(args.model, args.siglip, args.data, args.train_data, Path(args.output), args.batch_size)
    print(", ".join(f"{name} {value:.4g}" for name, value in report.items() if isinstance(value, (int, float))))


if __name__ == "__main__":
    main()
