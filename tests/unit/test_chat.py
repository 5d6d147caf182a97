"""The terminal: what typed lines get, on a model with random weights that was saved and opened again."""

import io
import sys

import pytest
import torch
from PIL import Image

from megadual import chat
from megadual.errors import UserError
from megadual.hf.folder import open_folder
from megadual.hf.modeling_megadual import MegaDualForCausalLM
from megadual.testing.models import write_export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a picture.png"
    Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 20).save(path)
    return path


def talk(monkeypatch, capsys, folder, output, *lines: str):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    chat.main([str(folder), "--device", "cpu", "--output", str(output), "--seed", "3"])
    return capsys.readouterr()


def test_a_conversation(monkeypatch, capsys, folder, picture, tmp_path):
    """Each answer is the model's own on all that was said before, drawn images included."""
    output = tmp_path / "drawings"
    lines = [
        "/set max_new_tokens 5",
        f"/image '{picture}'",
        "two cats?",
        "/edit a tree",
        "/draw two cats",
        "and?",
        "/describe",
        f"/describe '{picture}'",
        "/history",
        "/reset",
        "/history",
        "/quit",
        "/bla",
    ]
    said = talk(monkeypatch, capsys, folder, output, *lines)
    model, shown = open_folder(folder, "cpu"), Image.open(picture)
    seeds = iter(range(3, 100))

    def saved(parts) -> list[str]:
        return [
            part.strip() if isinstance(part, str) else str(output / f"drawing-{next(seeds):06d}.png") for part in parts
        ]

    messages = [{"role": "user", "content": [shown, "two cats?"]}]
    options = dict(max_new_tokens=5, seed=3)
    first = model.interleave(messages, **options)
    expected = ["max_new_tokens is 5", "1 before the next line", "\n".join(saved(first))]
    drawn = [part for part in first if not isinstance(part, str)]
    edited = model.edit([shown, *drawn][-1], "a tree", seed=3 + len(drawn))
    two_cats = model.draw("two cats", seed=4 + len(drawn))
    expected += [*saved(edited), *saved(two_cats)]
    for text, answer in (("a tree", edited), ("two cats", two_cats), ("and?", None)):
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": text}]
        first = answer
    last = model.interleave(messages, max_new_tokens=5, seed=5 + len(drawn))
    expected += ["\n".join(saved(last))]
    described = [part for part in [*two_cats, *last] if not isinstance(part, str)][-1]
    expected += [text.strip() for text in model.describe([described, shown], max_new_tokens=5)]
    beginning = "\n".join(expected) + "\n"
    assert said.out.startswith(beginning)
    rest = said.out[len(beginning) :].splitlines()
    assert rest[0] == f"user: [{picture}] two cats?" and "user: a tree" in rest and "user: and?" in rest
    assert rest[-2:] == ["a new conversation", ""]
    assert "16/16" in said.err and "bla" not in said.err  # positions drawn; nothing is read after /quit
    assert Image.open(output / f"drawing-{4 + len(drawn):06d}.png").tobytes() == two_cats[0].tobytes()


def test_mistakes_are_told_and_the_conversation_goes_on(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    Image.new("RGB", (40, 40)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    lines = [
        "/describe nowhere.png",
        f"/describe {tmp_path}/notes.png",
        f"/image {tmp_path}/cut.png",
        "/set seed x",
        "/set top_k 0",
        "/set seed -1",
        "/set speed 3",
        "/image 'two",
        "/edit a tree",
        "/describe",
        "/draw",
        "/paint a cat",
    ]
    said = talk(monkeypatch, capsys, folder, tmp_path, *lines, "/history", "/help")
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    expected = [
        "'nowhere.png' cannot be read", "notes.png' cannot be read", "cut.png' cannot be read",
        "seed x: it takes a whole number", "top_k 0: it must be at least 1", "seed -1: it must be at least 0",
        "no option 'speed'", "a quote is not closed", "no image yet", "no image yet", "/draw needs more than its name",
        "'/paint' is not understood",
    ]  # fmt: skip
    assert len(errors) == len(expected) and all(part in error for part, error in zip(expected, errors, strict=True))
    assert said.out.startswith("\n") and "options: seed 3," in said.out  # nothing was said so far


def test_what_the_model_refuses_ends_no_conversation(monkeypatch, capsys, folder, tmp_path):
    def refuse(self, *args, **kwargs):
        raise torch.OutOfMemoryError("no memory for a cache\nof any size")

    monkeypatch.setattr(MegaDualForCausalLM, "interleave", refuse)
    said = talk(monkeypatch, capsys, folder, tmp_path, "two cats", "/history", "/set seed 7")
    assert "error: no memory for a cache\n" in said.err and said.out == "\nseed is 7\n"


def test_a_folder_that_is_no_export_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="is not an exported model"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="--device cuda:9 is not here"):
        open_folder(folder, "cuda:9")


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_folder_opens_with_a_device_map(folder, device_map):
    placed, plain = MegaDualForCausalLM.from_pretrained(folder, device_map=device_map), open_folder(folder, "cpu")
    assert placed.draw("two cats", seed=5)[0].tobytes() == plain.draw("two cats", seed=5)[0].tobytes()
