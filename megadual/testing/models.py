"""A tiny DualToken and text tokenizer, saved, and a run that uses them, for tests."""

from pathlib import Path

import torch

from megadual.config import load_config
from megadual.hf import export
from megadual.hf.modeling_megadual import MegaDualForCausalLM
from megadual.streams import Marks
from megadual.testing.shards import random_documents, write_shard_set
from megadual.testing.vision import tiny_dualtoken
from megadual.text import fingerprint, load_text_tokenizer, save_text_tokenizer, train_text_tokenizer
from megadual.train.config import PretrainConfig
from megadual.vision import DualToken

IMAGE_SIZE, DEPTH, CODEBOOK = 16, 3, 32  # tiny_dualtoken's
CAPTIONS = ["two red apples to the left of a cat, on blue", "a small tree above three large cars, on white"]


def write_dualtoken(folder: Path, seed: int = 0) -> DualToken:
    """The tiny DualToken of 4 x 4 positions for 16 px images, saved in `folder`."""
    dualtoken = tiny_dualtoken(seed)
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
        streams=dualtoken.config.code_streams,
        vocabulary=len(tokenizer),
        special=Marks.of(tokenizer),
    )
    write_shard_set(
        folder / "shards",
        documents,
        dualtoken={"fingerprint": dualtoken.fingerprint(), "path": str(folder / "dualtoken")},
        text_tokenizer={"fingerprint": fingerprint(tokenizer), "path": str(folder / "text_tokenizer")},
        marks=Marks.of(tokenizer),
    )
    return sized_run(
        f"model.dualtoken={folder}/dualtoken", f"model.text_tokenizer={folder}/text_tokenizer",
        f"data.sets=[{folder}/shards]", f"run.dir={folder}/run", *overrides,
    )  # fmt: skip


def sized_run(*overrides: str) -> PretrainConfig:
    """A resolved run of two steps of a model of two layers; `overrides` give the rest."""
    sizes = [
        "model.preset=tiny", "model.layers=2", "model.hidden=64", "model.ffn=96", "model.heads=4",
        "model.kv_heads=2", "model.head.width=32", "model.head.layers=2", "model.head.heads=2", "model.head.ffn=48",
        "train.steps=2", "train.seq_len=64", "train.global_batch_tokens=256", "train.lr=1e-2",
    ]  # fmt: skip
    return load_config(PretrainConfig, None, [*sizes, *overrides])


def write_export(folder: Path) -> Path:
    """An exported model of 512 positions with random weights, in `folder`/hf."""
    run = write_run(folder, "train.seq_len=512", "train.global_batch_tokens=512")
    tokenizer = load_text_tokenizer(run.model.text_tokenizer)
    torch.manual_seed(0)
    config = export.model_config(run, tokenizer, export.read_dualtoken(run), torch.float32)
    MegaDualForCausalLM(config).save_pretrained(folder / "hf")
    save_text_tokenizer(tokenizer, folder / "hf")
    return folder / "hf"
