"""A tiny run for tests: a random shard set on disk, its vocabulary, and a config that trains on it."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from megadual.engine import cpu

cpu.install()

from megadual.config import load_config  # noqa: E402
from megadual.data.dataset import PackedDataset  # noqa: E402
from megadual.data.source import Source  # noqa: E402
from megadual.engine.megatron import MegatronEngine  # noqa: E402
from megadual.engine.protocol import Engine  # noqa: E402
from megadual.engine.topology import topology  # noqa: E402
from megadual.model.dual_lm import Vocabulary  # noqa: E402
from megadual.streams import Stream  # noqa: E402
from megadual.testing.shards import SPECIAL, random_conversations, random_documents, write_shard_set  # noqa: E402
from megadual.train import setup  # noqa: E402
from megadual.train.config import PretrainConfig  # noqa: E402
from megadual.train.metrics import numbers_of  # noqa: E402

TEXT_VOCABULARY, GRID = 300, (3, 3)
STREAMS = [Stream(name, depth=3, codebook_size=64, code_dim=8) for name in ("semantic", "pixel")]


def write_tiny_set(
    root: Path,
    count: int = 200,
    images: tuple[int, int] = (0, 2),
    streams: list[Stream] = STREAMS,
    conversations: int = 0,
) -> Path:
    """A shard set of random documents with between images[0] and images[1] images, and of conversations."""
    documents = random_documents(count, grid=GRID, streams=streams, vocabulary=TEXT_VOCABULARY, images=images)
    documents += random_conversations(conversations, grid=GRID, streams=streams)
    return write_shard_set(root, documents)


def vocabulary(streams: list[Stream] = STREAMS, seed: int = 0) -> Vocabulary:
    """Random code vectors for each stream."""
    generator = torch.Generator().manual_seed(seed)
    codebooks = {
        stream.name: torch.randn(stream.codebook_size, stream.code_dim, generator=generator) for stream in streams
    }
    return Vocabulary(TEXT_VOCABULARY, streams, codebooks)


def tiny_run(folder: Path, shards: Path, *overrides: str, **settings) -> PretrainConfig:
    """A resolved config of a 4-layer model on `shards`, 5 steps of 8 rows; `overrides` are dotted, `settings` the
    set's.
    """
    data = json.dumps([{"path": str(shards), **settings}])
    defaults = [
        "model.preset=tiny", "model.hidden=64", "model.ffn=128", "model.heads=4", "model.kv_heads=2",
        "model.head.width=32", "model.head.layers=2", "model.head.heads=2", "model.head.ffn=64",
        "model.dualtoken=unused", "model.text_tokenizer=unused", f"data.sets={data}",
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


def inputs_of(run: PretrainConfig, streams: list[Stream] = STREAMS) -> setup.Inputs:
    """What `setup.read_inputs` returns where the run's DualToken has `streams`; resolves the run's stages."""
    streams = setup.choose_streams(streams, run.model.streams)
    sets, held_out = setup.open_sets(run, None, streams)
    inputs = setup.Inputs(sets, SPECIAL, vocabulary(streams), held_out)
    setup.resolve_stages(run, inputs)
    return inputs


def build(run: PretrainConfig, streams: list[Stream] = STREAMS) -> tuple[Engine, PackedDataset]:
    """(engine, data) of a tiny run in this process's group."""
    layout, inputs = topology(run, dist.get_world_size()), inputs_of(run, streams)
    engine = setup.engine(run, layout, inputs.vocabulary)
    return engine, setup.dataset(run, inputs.sets, SPECIAL, layout, engine.data_rank)


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of the weights that this rank has of its first chunk, on the host (collective)."""
    if isinstance(engine, MegatronEngine):
        engine.gather_weights()
    return {name: p.detach().to("cpu", copy=True) for name, p in engine.chunks[0].named_parameters()}


def sources(run: PretrainConfig) -> list[Source]:
    """The run's shard sets, of training, with all their streams."""
    return [Source.open(config, None) for config in run.data.sets]


def losses(run: PretrainConfig, streams: list[Stream] = STREAMS) -> list[dict]:
    """Train the run's steps without saving and return each step's numbers (a worker of run_distributed)."""
    engine, data = build(run, streams)
    results = [numbers_of(engine.train_step(data.step(s))) for s in range(run.train.steps)]
    engine.shutdown()
    return results


def losses_of(runs: list[PretrainConfig], streams: list[Stream] = STREAMS) -> list[list[dict]]:
    """`losses` of several runs of one world size, one after the other in the same processes."""
    return [losses(run, streams) for run in runs]
