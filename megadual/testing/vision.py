"""A DualToken, a SigLIP and image-text shards so small that tests build them in a moment."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import SiglipConfig, SiglipModel

from megadual.vision import DualToken, DualTokenConfig, StreamConfig
from megadual.vision.presets import changed

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (240, 220, 60)}


def tiny_siglip_config() -> SiglipConfig:
    """16 px, patches of 4, three layers of width 32."""
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {
        **shared,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "max_position_embeddings": 8,
        "projection_size": 32,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {**shared, "num_hidden_layers": 3, "image_size": 16, "patch_size": 4}
    return SiglipConfig(text_config=text, vision_config=vision)


def tiny_dualtoken_config(**changes) -> DualTokenConfig:
    """A grid of 4 x 4 positions, 3 codes of 32 in each of two streams; `changes` as `presets.changed` takes them."""
    sizes = {"depth": 3, "codebook_size": 32, "code_dim": 8}
    fields = {
        "siglip": tiny_siglip_config().to_dict(),
        "streams": {
            "semantic": StreamConfig(layers=[2], feeds=["teacher"], **sizes),
            "pixel": StreamConfig(
                layers=[1, 1], weights=[1.0, 0.6], feeds=["picture"], timing="per_depth", **sizes
            ),
        },
        "decoder_latent": 4,
        "decoder_in_channels": 16,
        "decoder_channels": 8,
        "decoder_multipliers": [1, 2, 2],
        "decoder_res_blocks": 0,
        "decoder_attention": [4],
        "decoder_norm_groups": 4,
    }  # fmt: skip
    return changed(fields, **changes)


def tiny_dualtoken(seed: int = 0, **changes) -> DualToken:
    """In eval mode, with random weights."""
    torch.manual_seed(seed)
    return DualToken(tiny_dualtoken_config(**changes)).eval()


def write_tiny_siglip(folder: str | Path, seed: int = 0) -> Path:
    """A HF SiglipModel folder with random weights."""
    torch.manual_seed(seed)
    SiglipModel(tiny_siglip_config()).save_pretrained(folder)
    return Path(folder)


def write_tiny_pairs(folder: str | Path, shards: int = 2, pairs: int = 16, size: int = 20, seed: int = 0) -> str:
    """Webdataset shards of a coloured disc on a ground, with captions; returns their glob pattern."""
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:size, :size]
    for shard in range(shards):
        with tarfile.open(folder / f"pairs-{shard:05d}.tar", "w") as tar:
            for i in range(pairs):
                ground, disc = rng.choice(list(COLOURS), 2)
                y, x, radius = rng.integers(4, size - 4), rng.integers(4, size - 4), rng.integers(3, 7)
                inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
                pixels = np.where(inside[..., None], COLOURS[disc], COLOURS[ground]).astype(np.uint8)
                image = io.BytesIO()
                Image.fromarray(pixels).save(image, "PNG")
                members = {"png": image.getvalue(), "txt": f"a {disc} disc on {ground}".encode()}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{shard:02d}{i:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / "pairs-*.tar")
