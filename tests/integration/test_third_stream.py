"""A third stream, by the tokenizer's config alone: from its training over shards and layouts to a drawing."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from checkpoints_tools import convert_from_hf, convert_to_hf, verify
from data_pipeline.config import PipelineConfig
from data_pipeline.run import tokenize
from megadual.config import load_config
from megadual.data.mds_reader import ShardSet
from megadual.engine.topology import topology
from megadual.errors import UserError
from megadual.hf.folder import open_folder
from megadual.testing.distributed import run_distributed
from megadual.testing.layouts import TOLERANCE, differences
from megadual.testing.models import CAPTIONS, sized_run
from megadual.testing.vision import tiny_dualtoken_config, write_tiny_pairs, write_tiny_siglip
from megadual.text import save_text_tokenizer, train_text_tokenizer
from megadual.train import setup
from megadual.train.checkpoint import Checkpointer
from megadual.train.metrics import LOSS, numbers_of
from megadual.vision import DualToken
from megadual.vision.data import read_pairs
from pretrain import train_tokenizer

DETAIL = {"layers": [1], "feeds": ["picture"], "depth": 2, "codebook_size": 24, "code_dim": 16, "timing": "per_step"}
LAYOUTS = {
    "TP2+SP": ["parallel.tensor=2", "parallel.sequence=true"],
    "PP2": ["parallel.pipeline=2"],
    "ZeRO-3": ["engine=deepspeed", "parallel.zero_stage=3"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A DualToken of three streams, trained for two steps, and the shards that it makes of the pairs."""
    folder = tmp_path_factory.mktemp("third")
    pairs = write_tiny_pairs(folder / "pairs")
    model = {k: v for k, v in dataclasses.asdict(tiny_dualtoken_config()).items() if k != "siglip"}
    model["streams"]["detail"] = DETAIL
    config = {
        "siglip": str(write_tiny_siglip(folder / "siglip")), "model": model, "run": {"dir": str(folder / "tokenizer")},
        "train": {"steps": 2, "loss": {"lpips": 0, "gan": 0}}, "data": {"train": pairs, "batch_size": 8, "shuffle": 16},
    }  # fmt: skip
    (folder / "tokenizer.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    train_tokenizer.main(["--config", str(folder / "tokenizer.yaml")])
    save_text_tokenizer(train_text_tokenizer(CAPTIONS, 300), folder / "text_tokenizer")
    tokenizers = [f"dualtoken={folder}/tokenizer/dualtoken", f"text_tokenizer={folder}/text_tokenizer"]
    given = [f"inputs=['{pairs}']", f"output={folder}/shards", *tokenizers, "workers.address=local", "workers.count=1"]
    given.append("filters.duplicates=false")
    tokenize(load_config(PipelineConfig, None, given))
    return folder


def run_of(folder: Path, name: str, *overrides: str):
    """Two steps on the shards, in a run folder of its own."""
    given = [f"model.dualtoken={folder}/tokenizer/dualtoken", f"model.text_tokenizer={folder}/text_tokenizer"]
    return sized_run(*given, f"data.sets=[{folder}/shards]", f"run.dir={folder}/{name}", *overrides)


def train_and_save(run) -> list[dict]:
    """The steps' results (a worker of run_distributed)."""
    layout, inputs = topology(run, dist.get_world_size()), setup.read_inputs(run)
    engine = setup.engine(run, layout, inputs.vocabulary)
    data = setup.dataset(run, inputs.sets, inputs.marks, layout, engine.data_rank)
    results = [numbers_of(engine.train_step(data.step(step))) for step in range(run.train.steps)]
    checkpointer = Checkpointer(run)
    checkpointer.save(engine, run.train.steps)
    checkpointer.finish()
    engine.shutdown()
    return results


def losses_of(result: dict) -> list[str]:
    return [name.removeprefix(LOSS) for name in result if name.startswith(LOSS)]


def test_shards_hold_what_the_tokenizer_encodes(folder):
    dualtoken, shards = DualToken.from_pretrained(folder / "tokenizer/dualtoken"), ShardSet(folder / "shards")
    images, _ = read_pairs(str(folder / "pairs/pairs-*.tar"), 16)
    encoded = dualtoken.encode(images, pooled=False).codes
    assert {name: codes.shape[1:] for name, codes in encoded.items()} == {
        "semantic": (4, 4, 3), "pixel": (4, 4, 3), "detail": (4, 4, 2),
    }  # fmt: skip
    assert len(shards) == len(images)
    for i in range(len(shards)):
        for name, codes_ND in shards[i].codes.items():
            assert torch.equal(torch.from_numpy(codes_ND.astype("int64")), encoded[name][i].flatten(0, 1)), name
    detail = {name: codes.clone() for name, codes in encoded.items()}
    detail["detail"] = (detail["detail"] + 1) % 24
    assert not torch.equal(dualtoken.decode(detail), dualtoken.decode(encoded)), "the picture reads the third stream"


def test_every_layout_trains_as_one_process_and_exports_the_same(folder, tmp_path):
    (expected,) = run_distributed(train_and_save, 1, run_of(folder, "one"))
    depths = {"semantic": 3, "pixel": 3, "detail": 2}
    assert {name: len(expected[0][f"depth_{name}"]) for name in depths} == depths
    assert losses_of(expected[0]) == ["text", *depths]
    for name, overrides in LAYOUTS.items():
        run = run_of(folder, name, *overrides)
        found = run_distributed(train_and_save, 2, run)[0]
        assert max(differences(found, expected)) < TOLERANCE["fp32"], name
        hf, start, again = (tmp_path / name / part for part in ("hf", "start", "again"))
        convert_to_hf.main(["--checkpoint", run.run.dir, "--output", str(hf)])
        verify.main(["--checkpoint", run.run.dir, "--model", str(hf)])  # exits with 1 where they differ
        convert_from_hf.main(["--model", str(hf), "--output", str(start)])
        convert_to_hf.main(["--checkpoint", str(start), "--output", str(again)])
        for file in ("model.safetensors", "config.json"):
            assert (hf / file).read_bytes() == (again / file).read_bytes(), file
    model = open_folder(hf)
    first, second = model.draw(CAPTIONS, seed=1)
    assert first.size == (16, 16) and first.tobytes() != second.tobytes()
    assert isinstance(model.describe([first])[0], str)


def test_some_of_a_sets_streams_train_and_draw_if_the_picture_needs_no_others(folder, tmp_path):
    for streams, draws in (("semantic", False), ("pixel,detail", True)):
        run = run_of(folder, streams, f"model.streams=[{streams}]")
        (results,) = run_distributed(train_and_save, 1, run)
        assert losses_of(results[0]) == ["text", *streams.split(",")]
        convert_to_hf.main(["--checkpoint", run.run.dir, "--output", str(tmp_path / streams)])
        verify.main(["--checkpoint", run.run.dir, "--model", str(tmp_path / streams)])
        model = open_folder(tmp_path / streams)
        answer = model.interleave("two", max_new_tokens=4, max_images=0)
        assert model.draws == draws and all(isinstance(part, str) for part in answer)
        if not draws:
            with pytest.raises(ValueError, match=r"decoded from the streams \['pixel', 'detail'\], it writes"):
                model.draw("two")
    with pytest.raises(UserError, match="model.streams.*sound.*'semantic', 'pixel', 'detail'"):
        setup.read_inputs(run_of(folder, "none", "model.streams=[sound]"))
