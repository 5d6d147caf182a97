"""Pictures for benchmarks: read back as each benchmark's scorer reads its folder, drawn again, spread over workers."""

import hashlib
import json
import os
import re
from pathlib import Path

import pandas
import pytest
from PIL import Image

from megadual.errors import UserError
from megadual.evaluate.__main__ import main
from megadual.evaluate.benchmarks import read_prompts
from megadual.evaluate.draw import Sampling, Workers, draw
from megadual.testing.models import IMAGE_SIZE, write_export

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "bus", "count": 2}], "prompt": "a photo of two buses"},
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Each benchmark's prompts in the form of its own files."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "geneval").write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    (folder / "genai-bench").write_text(json.dumps({"00000": {"prompt": "a cat"}, "00007": {"prompt": "no dog"}}))
    (folder / "dpg").mkdir()
    for name in ("COCOval2014000000000192", "drawtext12"):
        (folder / "dpg" / f"{name}.txt").write_text(f"A long text about {name}.\n")
    (folder / "wise").mkdir()
    for name, number in (("natural_science", 701), ("cultural_common_sense", 1)):
        entry = {"Prompt": f"fact {number}", "prompt_id": number, "Explanation": "", "Subcategory": ""}
        (folder / "wise" / f"{name}.json").write_text(json.dumps([entry]))
    (folder / "t2i-compbench").write_text("a green bench and a blue bowl\na red car\t0\n")
    mjhq = {"0f1": {"category": "art", "prompt": "x"}, "0f2": {"category": "food", "prompt": "y"}}
    (folder / "mjhq").write_text(json.dumps(mjhq))
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "record.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_geneval(folder: Path) -> list[dict]:
    """What GenEval's evaluation finds, as it is stated: numbered folders, in each one JSON object and samples/."""
    found = []
    for subfolder in sorted(os.listdir(folder)):
        if (folder / subfolder).is_dir() and subfolder.isdigit():
            metadata = json.loads((folder / subfolder / "metadata.jsonl").read_text())
            for name in sorted(os.listdir(folder / subfolder / "samples")):
                assert re.match(r"\d+\.png", name)
                Image.open(folder / subfolder / "samples" / name).load()
                found.append({"filename": f"{subfolder}/samples/{name}", **metadata})
    return found


@pytest.fixture(scope="module")
def geneval(model, prompts, tmp_path_factory):
    output = tmp_path_factory.mktemp("geneval") / "out"
    arguments = ["--benchmark", "geneval", "--prompts", str(prompts / "geneval"), "--model", str(model)]
    main(["draw", *arguments, "--output", str(output), "--batch", "8", "--workers", "0", "--device", "cpu"])
    return output


def test_geneval_finds_its_pictures(geneval, model):
    found = read_geneval(geneval)
    first = [f"00000/samples/000{k}.png" for k in range(4)]
    assert [each["filename"] for each in found[:5]] == [*first, "00001/samples/0000.png"]
    assert [each["prompt"] for each in found[::4]] == [line["prompt"] for line in GENEVAL]
    assert {each["tag"] for each in found} == {"single_object", "counting", "colors"} and len(found) == 12
    # summary_scores.py groups a table of one row an image by `metadata` and by `tag`.
    table = pandas.DataFrame([{**each, "metadata": json.dumps(each["include"]), "correct": True} for each in found])
    assert len(table.groupby("metadata")) == 3
    assert len(set(digests(geneval).values())) == 12 + 3  # no picture twice
    record = json.loads((geneval / "record.json").read_text())
    assert record["complete"] and record["images_per_prompt"] == 4 and record["model"]["path"] == str(model)
    assert record["sampling"] == {"cfg_scale": 3.0, "temperature": 1.0, "top_k": 900, "top_p": 0.96, "seed": 0}


def test_goes_on_where_it_was_killed(geneval, model, prompts, tmp_path, monkeypatch):
    """Half-written files never count, what is missing is drawn as it was, and nothing else is drawn again."""
    from megadual.evaluate import draw as module

    arguments = ("geneval", prompts / "geneval", model, tmp_path / "out", Sampling())
    save, saved = Image.Image.save, []

    def killed(image, path, **options):
        saved.append(path)
        if len(saved) == 6:
            Path(path).write_bytes(b"\x89PNG half")
            raise KeyboardInterrupt
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        draw(*arguments, batch=8)
    monkeypatch.undo()
    assert not json.loads((tmp_path / "out" / "record.json").read_text())["complete"]
    left = {name: path for name, path in digests(tmp_path / "out").items() if name.endswith(".png")}
    assert len(left) == 5

    drawn = []
    one = module.Drawer.draw
    monkeypatch.setattr(module.Drawer, "draw", lambda self, batch: drawn.append(batch.first) or one(self, batch))
    draw(*arguments, batch=8)
    assert digests(tmp_path / "out") == digests(geneval)
    (tmp_path / "out" / "00002/samples/0001.png").unlink()
    record = draw(*arguments, batch=8)
    assert digests(tmp_path / "out") == digests(geneval) and drawn == [0, 2, 2]
    assert record["complete"] and [start["images"] for start in record["starts"]] == [0, 12, 4]
    assert draw(*arguments, batch=8)["starts"] == record["starts"] and len(drawn) == 3


def test_any_number_of_workers_draws_the_same(geneval, model, prompts, tmp_path):
    record = draw(
        "geneval", prompts / "geneval", model, tmp_path / "out", Sampling(), batch=8, gpus=0,
        workers=Workers(address="local", count=2, object_store_mb=80),
    )  # fmt: skip
    assert record["complete"] and record["starts"][0]["devices"] == ["cpu"]
    assert digests(tmp_path / "out") == digests(geneval)


@pytest.mark.parametrize(
    "benchmark, files",
    [
        ("genai-bench", ["mine/00000.jpeg", "mine/00007.jpeg"]),
        ("dpg", ["images/COCOval2014000000000192.png", "images/drawtext12.png"]),
        ("wise", ["images/1.png", "images/701.png"]),
        ("t2i-compbench", ["samples/a green bench and a blue bowl_000000.png", "samples/a red car_000001.png"]),
        ("mjhq", ["images/art/0f1.png", "images/food/0f2.png"]),
    ],
)
def test_each_scorer_finds_its_pictures_and_nothing_else(benchmark, files, model, prompts, tmp_path):
    per_prompt = 1 if benchmark == "t2i-compbench" else None
    record = draw(benchmark, prompts / benchmark, model, tmp_path, Sampling(), per_prompt, name="mine")
    assert sorted(digests(tmp_path)) == files
    sizes = {Image.open(tmp_path / file).size for file in files}
    assert sizes == {(2 * IMAGE_SIZE,) * 2 if benchmark == "dpg" else (IMAGE_SIZE,) * 2}
    assert {Image.open(tmp_path / file).format for file in files} == {record["format"].split(",")[0]}
    assert all(file.startswith(f"{record['pictures']}/") for file in files)


def test_numbers_of_compbench_go_on_from_prompt_to_prompt(model, prompts, tmp_path):
    """Its scorer sorts by them, and splits names at '_'."""
    draw("t2i-compbench", prompts / "t2i-compbench", model, tmp_path, Sampling(), 2)
    names = sorted(os.listdir(tmp_path / "samples"), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == ["a green bench and a blue bowl"] * 2 + ["a red car"] * 2


def test_tiles_are_the_images_in_reading_order(model, prompts, tmp_path):
    draw("dpg", prompts / "dpg", model, tmp_path / "four", Sampling())
    draw("dpg", prompts / "dpg", model, tmp_path / "one", Sampling(seed=2), 1)  # of the first prompt's third image
    four = Image.open(tmp_path / "four/images/COCOval2014000000000192.png")
    third = four.crop((0, IMAGE_SIZE, IMAGE_SIZE, 2 * IMAGE_SIZE))
    assert third.tobytes() == Image.open(tmp_path / "one/images/COCOval2014000000000192.png").tobytes()


def test_what_was_drawn_otherwise_is_not_gone_on_with(geneval, model, prompts, tmp_path):
    with pytest.raises(UserError, match="was drawn with another sampling: .*3.0.*, now .*5.0.*; give a new folder"):
        draw("geneval", prompts / "geneval", model, geneval, Sampling(cfg_scale=5.0), batch=8)
    (tmp_path / "other").write_text("a line")
    with pytest.raises(UserError, match="holds other files and no record.json; give a new folder"):
        draw("geneval", prompts / "geneval", model, tmp_path, Sampling())


def test_wrong_prompts_are_told(prompts, tmp_path):
    with pytest.raises(UserError, match="geneval takes evaluation_metadata.jsonl"):
        read_prompts("geneval", prompts / "mjhq")
    with pytest.raises(UserError, match="--prompts '.*nowhere': dpg takes a folder of .txt files"):
        read_prompts("dpg", tmp_path / "nowhere")
    (tmp_path / "lines").write_text("a/b\n")
    with pytest.raises(UserError, match="'a/b' can't be part of a file's name"):
        read_prompts("t2i-compbench", tmp_path / "lines")
