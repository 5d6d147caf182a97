"""A tiny run for tests: a random shard set on disk, its vocabulary, and a config that trains on it."""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist

from megadual.engine import cpu

cpu.install()

from megadual.config import load_config  # noqa: E402
from megadual.data.mds_reader import ShardSet  # noqa: E402
from megadual.engine.topology import topology  # noqa: E402
from megadual.model.dual_lm import Vocabulary  # noqa: E402
from megadual.streams import STREAMS  # noqa: E402
from megadual.testing.shards import SPECIAL, random_documents, write_shard_set  # noqa: E402
from megadual.train import setup  # noqa: E402
from megadual.train.config import PretrainConfig  # noqa: E402

TEXT_VOCABULARY, CODEBOOK, CODE_DIM, DEPTH, GRID = 300, 64, 8, 3, (3, 3)


def write_tiny_set(root: Path, count: int = 200, images: tuple[int, int] = (0, 2)) -> Path:
    """A shard set of random documents with between images[0] and images[1] images."""
    documents = random_documents(
        count, grid=GRID, depth=DEPTH, codebook_size=CODEBOOK, vocabulary=TEXT_VOCABULARY, images=images
    )
    return write_shard_set(root, documents)


def vocabulary(seed: int = 0) -> Vocabulary:
    """Random code vectors for both streams."""
    generator = torch.Generator().manual_seed(seed)
    codebooks = {stream: torch.randn(CODEBOOK, CODE_DIM, generator=generator) for stream in STREAMS}
    return Vocabulary(TEXT_VOCABULARY, DEPTH, codebooks)


def tiny_run(folder: Path, shards: Path, *overrides: str) -> PretrainConfig:
    """A resolved config of a 4-layer model on `shards`, 5 steps of 8 rows; `overrides` are dotted."""
    defaults = [
        "model.preset=tiny", "model.hidden=64", "model.ffn=128", "model.heads=4", "model.kv_heads=2",
        "model.head.width=32", "model.head.layers=2", "model.head.heads=2", "model.head.ffn=64",
        "model.dualtoken=unused", "model.text_tokenizer=unused", f"data.sets=[{shards}]",
        "train.steps=5", "train.seq_len=64", "train.global_batch_tokens=512", "train.lr=1e-3",
        f"run.dir={folder}",
    ]  # fmt: skip
    run = load_config(PretrainConfig, None, [*defaults, *overrides])
    return run


def golden_run(folder: Path, shards: Path, engine: str, steps: int) -> PretrainConfig:
    """A resolved config of the tiny preset as it is, with warm-up, clipping and weights of the losses that count."""
    overrides = [
        f"engine={engine}", "model.preset=tiny", "model.dualtoken=unused", "model.text_tokenizer=unused",
        f"data.sets=[{shards}]", f"train.steps={steps}", "train.seq_len=64", "train.global_batch_tokens=512",
        "train.lr=1e-3", "train.min_lr=1e-4", "train.warmup_steps=5", "train.clip_grad=1.0",
        "train.loss.text=0.5", "train.loss.semantic=1.5", "train.loss.pixel=0.75", f"run.dir={folder}",
    ]  # fmt: skip
    run = load_config(PretrainConfig, None, overrides)
    return run


def build(run: PretrainConfig):
    """(engine, data) of a tiny run in this process's group."""
    layout = topology(run, dist.get_world_size())
    inputs = setup.Inputs([ShardSet(root) for root in run.data.sets], SPECIAL, vocabulary())
    setup.resolve_stages(run, inputs)
    engine = setup.engine(run, layout, inputs.vocabulary)
    return engine, setup.dataset(run, inputs.sets, SPECIAL, layout, engine.data_rank)


def losses(run: PretrainConfig) -> list[dict]:
    """Train the run's steps without saving and return each step's results (a worker of run_distributed)."""
    engine, data = build(run)
    results = [dataclasses.asdict(engine.train_step(data.step(s))) for s in range(run.train.steps)]
    engine.shutdown()
    return results


def losses_of(runs: list[PretrainConfig]) -> list[list[dict]]:
    """`losses` of several runs of one world size, one after the other in the same processes."""
    return [losses(run) for run in runs]
