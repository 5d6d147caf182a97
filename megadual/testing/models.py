"""A tiny DualToken and text tokenizer with random weights, and a run that uses them, for tests."""

from pathlib import Path

import torch
from transformers import SiglipConfig

from megadual.config import PretrainConfig, load_config
from megadual.model import presets
from megadual.streams import SpecialIds
from megadual.testing.shards import random_documents, write_shard_set
from megadual.text import fingerprint, load_text_tokenizer, save_text_tokenizer, train_text_tokenizer
from megadual.vision import DualToken, DualTokenConfig

IMAGE_SIZE, PATCH, DEPTH, CODEBOOK = 16, 4, 3, 32
CAPTIONS = ["two red apples to the left of a cat, on blue", "a small tree above three large cars, on white"]


def write_dualtoken(folder: Path, seed: int = 0) -> DualToken:
    """A DualToken of 4 x 4 positions for 16 px images, saved in `folder`."""
    torch.manual_seed(seed)
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    vision = dict(**tower, image_size=IMAGE_SIZE, patch_size=PATCH)
    text = dict(**tower, vocab_size=64, bos_token_id=0, eos_token_id=0)
    config = DualTokenConfig(
        siglip=SiglipConfig(vision_config=vision, text_config=text).to_dict(),
        layer_shortcut=1,
        layer_recon=2,
        layer_sem=3,
        codebook_size=CODEBOOK,
        code_dim=8,
        depth=DEPTH,
        decoder_latent=4,
        decoder_in_channels=16,
        decoder_channels=8,
        decoder_multipliers=[1, 1, 2],
        decoder_res_blocks=1,
        decoder_attention=[],
        decoder_norm_groups=4,
    )
    dualtoken = DualToken(config).eval()
    dualtoken.save_pretrained(folder)
    return dualtoken


def write_run(folder: Path, *overrides: str) -> PretrainConfig:
    """A resolved run on 60 random documents, all its inputs written to `folder`; `overrides` are dotted."""
    dualtoken = write_dualtoken(folder / "dualtoken")
    save_text_tokenizer(train_text_tokenizer(CAPTIONS, 300), folder / "text_tokenizer")
    tokenizer = load_text_tokenizer(folder / "text_tokenizer")
    documents = random_documents(
        60,
        grid=dualtoken.config.grid,
        depth=DEPTH,
        codebook_size=CODEBOOK,
        vocabulary=len(tokenizer),
        special=SpecialIds.of(tokenizer),
    )
    write_shard_set(
        folder / "shards",
        documents,
        dualtoken={"fingerprint": dualtoken.fingerprint(), "path": str(folder / "dualtoken")},
        text_tokenizer={"fingerprint": fingerprint(tokenizer), "path": str(folder / "text_tokenizer")},
    )
    defaults = [
        "model.preset=tiny", "model.layers=2", "model.hidden=64", "model.ffn=96", "model.heads=4",
        "model.kv_heads=2", "model.head.width=32", "model.head.layers=2", "model.head.heads=2", "model.head.ffn=48",
        f"model.dualtoken={folder}/dualtoken", f"model.text_tokenizer={folder}/text_tokenizer",
        f"data.sets=[{folder}/shards]", "train.steps=2", "train.seq_len=64", "train.global_batch_tokens=256",
        "train.lr=1e-2", f"run.dir={folder}/run",
    ]  # fmt: skip
    run = load_config(PretrainConfig, None, [*defaults, *overrides])
    run.model = presets.resolve(run.model)
    return run
