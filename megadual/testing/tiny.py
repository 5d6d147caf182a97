"""A tiny run for tests: a random shard set on disk, its vocabulary, and a config that trains on it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from megadual.engine import cpu

cpu.install()

from megadual.config import PretrainConfig, load_config  # noqa: E402
from megadual.data.dataset import PackedDataset  # noqa: E402
from megadual.data.mds_reader import ShardSet  # noqa: E402
from megadual.engine.topology import topology  # noqa: E402
from megadual.model import presets  # noqa: E402
from megadual.model.dual_lm import Vocabulary  # noqa: E402
from megadual.streams import STREAMS, Document, SpecialIds  # noqa: E402

TEXT_VOCABULARY, CODEBOOK, CODE_DIM, DEPTH, GRID = 300, 64, 8, 3, (3, 3)
SPECIAL = SpecialIds(294, 295, 296, 297, 298, 299)


def write_shard_set(root: Path, documents: list[Document]) -> Path:
    """A finished shard set of one MDS folder; the fingerprints in its manifest are those of nothing."""
    from megadual.data.mds import document_writer

    root.mkdir(parents=True)
    with document_writer(root) as writer:
        for document in documents:
            writer.write(document.row())
    nothing = {"fingerprint": "0" * 64, "path": "nowhere"}
    manifest = {"documents": len(documents), "dualtoken": nothing, "text_tokenizer": nothing}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def random_documents(count: int, seed: int = 0, images: tuple[int, ...] = (1,)) -> list[Document]:
    """Documents of random text and codes, with as many images as `images` says in turn."""
    random = np.random.default_rng(seed)
    positions = GRID[0] * GRID[1]
    documents = []
    for index in range(count):
        number = images[index % len(images)]
        text = random.integers(0, SPECIAL.end_of_text, random.integers(3, 20)).astype(np.uint32)
        places = np.sort(random.integers(0, len(text) + 1, number))
        documents.append(
            Document(
                key=f"doc-{index}",
                text_ids=np.insert(text, places, SPECIAL.image).astype(np.uint32),
                **{s: random.integers(0, CODEBOOK, (number * positions, DEPTH)).astype(np.uint16) for s in STREAMS},
                grids=np.array([GRID] * number, dtype=np.uint16).reshape(number, 2),
            ).check(SPECIAL)
        )
    return documents


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
        "train.steps=5", "train.seq_len=64", "train.global_batch_tokens=512", "train.lr=3e-3",
        f"run.dir={folder}",
    ]  # fmt: skip
    run = load_config(PretrainConfig, None, [*defaults, *overrides])
    run.model = presets.resolve(run.model)
    return run


def build(run: PretrainConfig):
    """(engine, data) of a tiny run in this process's group."""
    import torch.distributed as dist

    from megadual.engine.megatron import MegatronEngine

    layout = topology(run, dist.get_world_size())
    engine = MegatronEngine(run, layout, vocabulary())
    sets = [ShardSet(root) for root in run.data.sets]
    train = run.train
    data = PackedDataset(
        run.data, train.seq_len, train.micro_batch_size, layout.rows_per_step, train.seed, SPECIAL,
        engine.data_rank, layout.data,
    )  # fmt: skip
    del sets
    return engine, data


def losses(run: PretrainConfig) -> list[dict]:
    """Train the run's steps without saving and return each step's results (a worker of run_distributed)."""
    engine, data = build(run)
    results = [dataclasses.asdict(engine.train_step(data.step(s))) for s in range(run.train.steps)]
    engine.shutdown()
    return results
