"""Checkpoints and exports that are broken, hostile or of another model: each command ends with one line that names it.

One tiny checkpoint and one export are made; a fault is made in a copy. `reseal`: with checksums that fit the fault, as
who means harm would have them.
"""

import dataclasses
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from checkpoints_tools import convert_from_hf, convert_to_hf, import_dualtoken, try_export, verify
from megadual.engine import sharded
from megadual.engine.topology import topology
from megadual.errors import UserError
from megadual.hf.folder import open_folder
from megadual.run.checkpoints import CHECKSUMS, LATEST, seal
from megadual.testing.checkpoints import train_and_save
from megadual.testing.distributed import run_distributed
from megadual.testing.models import write_run
from megadual.train import setup
from megadual.train.checkpoint import Checkpointer, starting_weights

WEIGHT = "decoder.layers.1.mlp.linear_fc2.weight"


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def marker(folder: Path) -> Path:
    return folder / "executed"


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: next(iter(sorted(folder.glob(pattern)))).unlink()


def cut(pattern: str) -> Callable[[Path], None]:
    """Half of a file."""

    def damage(folder: Path) -> None:
        path = next(iter(sorted(folder.glob(pattern))))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def garbage(pattern: str) -> Callable[[Path], None]:
    return lambda folder: next(iter(sorted(folder.glob(pattern)))).write_bytes(b"garbage") and None


def flip(pattern: str) -> Callable[[Path], None]:
    """One bit of a file's middle."""

    def damage(folder: Path) -> None:
        path = next(iter(sorted(folder.glob(pattern))))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 64
        path.write_bytes(content)

    return damage


def edit(name: str, **changes) -> Callable[[Path], None]:
    """Values of a JSON file, by dotted name; None removes one."""

    def damage(folder: Path) -> None:
        stored = json.loads((folder / name).read_text())
        for dotted, value in changes.items():
            *sections, last = dotted.split("__")
            place = stored
            for section in sections:
                place = place[section]
            place[last] = value
            if value is None:
                del place[last]
        (folder / name).write_text(json.dumps(stored))

    return damage


def edit_index(change: Callable) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = pickle.loads((folder / ".metadata").read_bytes())
        change(index, folder)
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    return damage


def hostile_index(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(marker(folder.parent))))


def hostile_in_index(index, folder: Path) -> None:
    index.planner_data = Evil(marker(folder.parent))


def hostile_entry(index, folder: Path) -> None:
    """A weight that is an object, which torch's planner unpickles."""
    place = next(place for at, place in index.storage_data.items() if at.fqn == WEIGHT)
    torch.save(Evil(marker(folder.parent)), folder / "evil.distcp")
    size = (folder / "evil.distcp").stat().st_size
    index.state_dict_metadata[WEIGHT] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(WEIGHT)] = dataclasses.replace(
        place, relative_path="evil.distcp", offset=0, length=size
    )


def hostile_item(index, folder: Path) -> None:
    """A weight whose file is a pickle."""
    torch.save(Evil(marker(folder.parent)), folder / "evil.distcp")
    size = (folder / "evil.distcp").stat().st_size
    for at, place in index.storage_data.items():
        if at.fqn == WEIGHT:
            index.storage_data[at] = dataclasses.replace(place, relative_path="evil.distcp", offset=0, length=size)


def lead_out(index, folder: Path) -> None:
    for at, place in index.storage_data.items():
        index.storage_data[at] = dataclasses.replace(place, relative_path=f"../{place.relative_path}")


def without_weight(index, folder: Path) -> None:
    del index.state_dict_metadata[WEIGHT]


def wrong_size(index, folder: Path) -> None:
    index.state_dict_metadata[WEIGHT].size = torch.Size([64, 95])


def half_there(index, folder: Path) -> None:
    chunk = index.state_dict_metadata[WEIGHT].chunks[0]
    chunk.sizes = torch.Size([chunk.sizes[0] // 2, *chunk.sizes[1:]])


def change_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        assert re.search(old, text)
        (folder / name).write_text(re.sub(old, new, text, count=1))

    return damage


def pointer(content: str | bytes) -> Callable[[Path], None]:
    return lambda checkpoint: write(LATEST, content)(checkpoint.parent)


# name -> (fault in a checkpoint, resealed, what the line of a conversion names, that of resuming and starting if other)
CHECKPOINT = {
    "latest dangling": (pointer("00000009"), False, "checkpoints/latest' names no checkpoint \\('00000009'\\)"),
    "latest empty": (pointer(""), False, "checkpoints/latest' names no checkpoint"),
    "latest binary": (pointer(b"\xff\xfe\x00"), False, "checkpoints/latest' names no checkpoint"),
    "latest elsewhere": (pointer("../../other"), False, "checkpoints/latest' names no checkpoint"),
    "progress missing": (remove("progress.json"), False, "progress.json \\(missing\\)"),
    "progress missing, resealed": (remove("progress.json"), True, "progress.json \\(missing\\)"),
    "progress empty": (write("progress.json", ""), False, "is damaged: progress.json;"),
    "progress not JSON, resealed": (write("progress.json", "{"), True, "progress.json' does not say how far"),
    "progress of other types": (
        edit("progress.json", step="two"), True, "progress.json' .*step and updates must be counts",
    ),
    "progress of another step": (edit("progress.json", step=10**20), True, "step is 1000.*, its folder's another"),
    "progress of no step": (edit("progress.json", step=0), True, "2 updates in 0 steps"),
    "position of other types": (edit("progress.json", data={"row": "x"}), True, "data is no position in rows"),
    "position that none can be": (
        edit("progress.json", data={"row": 8, "order": "x", "block": [0, [0]], "windows": [[10**12, 0]]}), True,
        "data is no position in rows",
    ),
    "checksums missing": (remove(CHECKSUMS), False, "checksums.json \\(missing\\)"),
    "checksums empty": (write(CHECKSUMS, ""), False, "checksums.json \\(not JSON\\)"),
    "checksums binary": (write(CHECKSUMS, b"\xff\xfe"), False, "checksums.json \\(not JSON\\)"),
    "no checksums": (write(CHECKSUMS, "{}"), False, "checksums.json \\(no checksums\\)"),
    "checksums of other types": (edit(CHECKSUMS, **{"config.yaml": 3}), False, "checksums.json \\(no checksums\\)"),
    "checksums lack a file": (
        edit(CHECKSUMS, **{"config.yaml": None}), False, "config.yaml \\(not in checksums.json\\)",
    ),
    "a file more": (write("more.distcp", "x"), False, "more.distcp \\(not in checksums.json\\)"),
    "config missing": (remove("config.yaml"), False, "config.yaml \\(missing\\)"),
    "config changed": (change_text("config.yaml", "layers: 2", "layers: 1"), False, "is damaged: config.yaml;"),
    "config empty, resealed": (write("config.yaml", ""), True, "config.yaml"),
    "config not YAML, resealed": (write("config.yaml", "a: [}"), True, "config.yaml"),
    "config a list, resealed": (write("config.yaml", "[3]"), True, "config.yaml"),
    "config of other types": (
        change_text("config.yaml", "layers: 2", "layers: two"), True, "config.yaml",
        "model.layers is two, the run's is 2",
    ),
    "config of fewer layers": (
        change_text("config.yaml", "layers: 2", "layers: 1"), True, "not of the model in its config.yaml: .*layers.1",
        "model.layers is 1, the run's is 2",
    ),
    "config of more layers": (
        change_text("config.yaml", "layers: 2", "layers: 6"), True, "not of the model in its config.yaml: .*layers.2",
        "model.layers is 6, the run's is 2",
    ),
    "config of other heads": (
        change_text("config.yaml", "kv_heads: 2", "kv_heads: 4"), True, "not of the model in its config.yaml",
        "model.kv_heads is 4, the run's is 2",
    ),
    "shard missing": (remove("*.distcp"), False, "distcp \\(missing\\)"),
    "shard missing, resealed": (remove("*.distcp"), True, "_0.distcp has no "),
    "shard cut": (cut("*.distcp"), False, "is damaged: __0_0.distcp;"),
    "shards cut, resealed": (cut("*.distcp"), True, "__0_0.distcp has no "),
    "bit flipped": (flip("*_0.distcp"), False, "is damaged: __0_0.distcp;"),
    "index missing": (remove(".metadata"), False, ".metadata \\(missing\\)"),
    "index garbage": (write(".metadata", b"\x80\x04garbage"), True, ".metadata is not its index"),
    "index cut": (cut(".metadata"), True, ".metadata is not its index"),
    "index hostile": (hostile_index, True, ".metadata is not its index: it names posix.mkdir"),
    "index hostile within": (edit_index(hostile_in_index), True, ".metadata is not its index: it names posix.mkdir"),
    "index leads out": (edit_index(lead_out), True, ".metadata is not its index: '../__0_"),
    "entry hostile": (
        edit_index(hostile_entry), True, "not of the model .*layers.1.mlp.down_proj.weight' is missing",
        f"{WEIGHT} is missing",
    ),
    "item hostile": (edit_index(hostile_item), True, f"evil.distcp has no {WEIGHT}"),
    "weight missing": (
        edit_index(without_weight), True, "layers.1.mlp.down_proj.weight' is missing", f"{WEIGHT} is missing",
    ),
    "weight of another size": (
        edit_index(wrong_size), True, "layers.1.mlp.down_proj.weight' is \\(64, 95\\), expected \\(64, 96\\)",
        f"{WEIGHT} is \\(64, 95\\), the run's is \\(64, 96\\)",
    ),
    "half a weight": (edit_index(half_there), True, f".metadata lacks a part of {WEIGHT}"),
}  # fmt: skip
assert len(CHECKPOINT) >= 25


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run, its export in several files)."""
    folder = tmp_path_factory.mktemp("faults")
    run = write_run(folder)
    run_distributed(train_and_save, 1, run)
    convert_to_hf.main(["--checkpoint", run.run.dir, "--output", str(folder / "hf"), "--max-shard-size", "100KB"])
    return run, folder / "hf"


def faulty(run, folder: Path, damage: Callable[[Path], None], reseal: bool) -> Path:
    """A copy of a run's folder with a fault in its checkpoint."""
    copy = shutil.copytree(run.run.dir, folder / "run")
    checkpoint = copy / "checkpoints" / "00000002"
    damage(checkpoint)
    if reseal:
        seal(checkpoint, {})
    return copy


def one_line(capsys, main, *args) -> str:
    """What a command says that ends with a user's mistake."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, args)])
    said = capsys.readouterr().err if isinstance(ended.value.code, int) else str(ended.value.code)
    assert ended.value.code == 2 or isinstance(ended.value.code, str)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert said.rstrip().endswith(line) and "Traceback" not in said and len(line) < 1000
    return line


@pytest.mark.parametrize("name", CHECKPOINT)
def test_conversion_of_a_faulty_checkpoint(made, tmp_path, capsys, name):
    run, export = made
    damage, reseal, expected, *_ = CHECKPOINT[name]
    copy = faulty(run, tmp_path, damage, reseal)
    assert re.search(expected, one_line(capsys, convert_to_hf.main, "--checkpoint", copy, "--output", tmp_path / "hf"))
    assert re.search(expected, one_line(capsys, verify.main, "--checkpoint", copy, "--model", export, "--samples", 0))
    assert not (tmp_path / "hf").exists() and not marker(copy / "checkpoints").exists()


def lines_of(run, folders: dict[str, Path]) -> dict[str, list[str]]:
    """What resuming and starting from each of these runs says; "" where it goes well."""
    inputs = setup.read_inputs(run)
    engine, said = setup.engine(run, topology(run, 1), inputs.vocabulary), {}

    def resume(folder: Path) -> None:
        run.run.dir, run.checkpoint.start = str(folder), None
        checkpointer = Checkpointer(run)
        checkpointer.load(engine, checkpointer.to_resume())

    def start(folder: Path) -> None:
        run.run.dir, run.checkpoint.start = str(folder.parent / "new"), str(folder)
        sharded.load_weights(engine.chunks, starting_weights(run))

    for name, folder in folders.items():
        said[name] = []
        for begin in (resume, start):
            try:
                begin(folder)
                said[name].append("")
            except UserError as error:
                said[name].append(str(error))
    engine.shutdown()
    return said


@pytest.fixture(scope="module", params=["megatron", "deepspeed"])
def begun(made, tmp_path_factory, request):
    """What `lines_of` says of every fault, and the folders."""
    folder, run = tmp_path_factory.mktemp("begun"), dataclasses.replace(made[0], engine=request.param)
    folders = {name: faulty(run, folder / str(i), *fault[:2]) for i, (name, fault) in enumerate(CHECKPOINT.items())}
    return run_distributed(lines_of, 1, run, folders)[0], folders


@pytest.mark.parametrize("name", CHECKPOINT)
def test_going_on_from_a_faulty_checkpoint(begun, name):
    said, folders = begun
    expected = CHECKPOINT[name][-1]
    resumed, started = said[name]
    assert re.search(expected, resumed) and "\n" not in resumed and len(resumed) < 1000
    assert re.search(expected, started) and "\n" not in started and len(started) < 1000
    assert not marker(folders[name] / "checkpoints").exists()


# name -> (fault in an export, what a line names: of opening it, of converting it back, of try_export.py, of verify.py;
# "" where it is no fault there, a list where verify.py reports the files as different
SHARD = "model-00002-of-*.safetensors"
EXPORT = {
    "weights missing": (
        remove(SHARD), "holds no model-00002", "holds no model-00002", "model-00002", "holds no model-00002",
    ),
    "weights garbage": (
        garbage(SHARD), *["model-00002-of-.* is damaged"] * 2, "opened", "model-00002-of-.* is damaged",
    ),
    "weights cut": (cut(SHARD), *["model-00002-of-.* is damaged"] * 2, "opened", "model-00002-of-.* is damaged"),
    "index garbage": (
        write("model.safetensors.index.json", "{"), *["index.json' is not JSON"] * 2, "opened", "index.json' is not",
    ),
    "index of other types": (
        write("model.safetensors.index.json", '{"weight_map": [1]}'), *["index.json' has no weight_map"] * 2, "opened",
        "index.json' has no weight_map",
    ),
    "index leads out": (
        edit("model.safetensors.index.json", weight_map={"a": "../a.safetensors"}),
        *["index.json' has no weight_map of the files beside it"] * 2, "opened", "has no weight_map",
    ),
    "index missing": (
        remove("model.safetensors.index.json"), *["holds no model.safetensors"] * 2, "opened", "no model.safetensors",
    ),
    "config missing": (
        remove("config.json"), "is not an exported model", "holds no config.json", "config.json", ["config.json"],
    ),
    "config not JSON": (
        write("config.json", "{"), *["config.json' is not JSON"] * 2, "config.json", "config.json' is not JSON",
    ),
    "config of fewer layers": (
        edit("config.json", text_config__num_hidden_layers=1, text_config__layer_types=["full_attention"]),
        *["its config.json: 'model.layers.1"] * 2, "layers.1",
        ["config.json"],
    ),
    "config of more layers": (
        edit("config.json", text_config__num_hidden_layers=3),
        *["describes no model: .*num_hidden_layers"] * 2, "opened",
        ["config.json"],
    ),
    "config of another width": (
        edit("config.json", text_config__intermediate_size=80), *["its config.json: .*\\(96, 64\\)"] * 2, "opened",
        ["config.json"],
    ),
    "config of other types": (
        edit("config.json", text_config__hidden_size="wide"), *["config.json' describes no model"] * 2, "opened",
        ["config.json"],
    ),
    "class file missing": (remove("modeling_megadual.py"), "", "", "modeling_megadual.py", ["modeling_megadual.py"]),
    "tokenizer missing": (
        remove("tokenizer.json"), "tokenizer.json' is missing", "no tokenizer.json", "tokenizer.json",
        ["tokenizer.json"],
    ),
    "tokenizer garbage": (
        write("tokenizer.json", '{"a": 1}'), "can't be opened", "tokenizer.json' is no tokenizer", None,
        ["tokenizer.json"],
    ),
    "generation config missing": (
        remove("generation_config.json"), "generation_config.json' is missing", "", "generation_config.json",
        ["generation_config.json"],
    ),
    "generation config changed": (
        edit("generation_config.json", eos_token_id=7), "", "", None, ["generation_config.json"],
    ),
    "processor changed": (edit("processor_config.json", image_size=8), "", "", None, ["processor_config.json"]),
    "chat template changed": (write("chat_template.jinja", "x"), "", "", None, ["chat_template.jinja"]),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORT)
def test_a_faulty_export(made, tmp_path, capsys, name, monkeypatch):
    run, export = made
    damage, opened, started, tried, verified = EXPORT[name]
    folder = shutil.copytree(export, tmp_path / "hf")
    damage(folder)
    if opened:
        with pytest.raises(UserError) as error:
            open_folder(folder, "cpu")
        assert re.search(opened, str(error.value)) and "\n" not in str(error.value)
    if started:
        assert re.search(
            started, one_line(capsys, convert_from_hf.main, "--model", folder, "--output", tmp_path / "start")
        )
        assert not (tmp_path / "start").exists()
    if tried:
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        with pytest.raises(SystemExit) as ended:
            try_export.open_model(str(folder))
        assert re.search(tried, ended.value.code) and "\n" not in ended.value.code
    args = ["--checkpoint", run.run.dir, "--model", folder, "--samples", 0]
    if isinstance(verified, str):
        assert re.search(verified, one_line(capsys, verify.main, *args))
    else:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            verify.main([*map(str, args)])
        report = json.loads(capsys.readouterr().out)
        assert ended.value.code == 1 and report["files_different"] == verified and not report["equal"]


DUALTOKEN = {
    "config missing": (remove("config.json"), "dualtoken': it holds no config.json"),
    "config garbage": (write("config.json", "{"), "dualtoken/config.json' is not JSON"),
    "config of other types": (edit("config.json", siglip={}), "dualtoken/config.json'|siglip is empty"),
    "other codes": (edit("config.json", decoder_channels=16), "DualToken in '.*dualtoken' are not those of its config"),
    "weights missing": (remove("model.safetensors"), "dualtoken' holds no model.safetensors"),
    "weights cut": (cut("model.safetensors"), "dualtoken/model.safetensors' is damaged"),
}


@pytest.mark.parametrize("name", DUALTOKEN)
def test_a_faulty_dualtoken(made, tmp_path, capsys, name):
    run, _ = made
    damage, expected = DUALTOKEN[name]
    folder = shutil.copytree(run.model.dualtoken, tmp_path / "dualtoken")
    damage(folder)
    old, new = re.escape(f"dualtoken: {run.model.dualtoken}"), f"dualtoken: {folder}"
    copy = faulty(run, tmp_path, change_text("config.yaml", old, new), reseal=True)
    line = one_line(capsys, convert_to_hf.main, "--checkpoint", copy, "--output", tmp_path / "hf")
    assert re.search(expected, line)


def test_nan_is_equal_to_nothing(made, tmp_path, capsys):
    """Not even where checkpoint and export have it alike."""
    run, _ = made
    folder = shutil.copytree(run.model.dualtoken, tmp_path / "dualtoken")
    weights = load_file(folder / "model.safetensors")
    weights["decoder.conv_out.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    old, new = re.escape(f"dualtoken: {run.model.dualtoken}"), f"dualtoken: {folder}"
    copy = faulty(run, tmp_path, change_text("config.yaml", old, new), reseal=True)
    convert_to_hf.main(["--checkpoint", str(copy), "--output", str(tmp_path / "hf")])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        verify.main(["--checkpoint", str(copy), "--model", str(tmp_path / "hf"), "--samples", "0"])
    report = json.loads(capsys.readouterr().out)
    assert not report["equal"] and report["tensors_different"] == ["dualtoken.decoder.conv_out.weight"]


def test_an_export_replaces_exports_alone(made, tmp_path, capsys):
    run, export = made
    folder, args = shutil.copytree(export, tmp_path / "hf"), ["--checkpoint", run.run.dir, "--output", tmp_path / "hf"]
    (folder / "notes.txt").write_text("mine")
    assert "holds what no export wrote: notes.txt" in one_line(capsys, convert_to_hf.main, *args)
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "config.json").is_file()
    (folder / "notes.txt").unlink()
    convert_to_hf.main([*map(str, args)])  # in one file, where there were several
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_weights_of_a_tokenizer_run_nothing(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"rqvaesiglip": {}}')
    torch.save({"state_dict": Evil(marker(tmp_path))}, tmp_path / "weights.pt")
    args = ["--config", tmp_path / "config.json", "--weights", tmp_path / "weights.pt", "--output", tmp_path / "out"]
    assert "weights.pt' can't be read as tensors" in one_line(capsys, import_dualtoken.main, *args)
    assert not marker(tmp_path).exists()
