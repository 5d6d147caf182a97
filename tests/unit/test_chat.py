"""The terminal: what typed lines get, on a model with random weights that was saved and opened again."""

import io
import sys

import pytest
from PIL import Image

from megadual import chat
from megadual.errors import UserError
from megadual.hf.folder import open_folder
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
    lines = [
        "draw two cats",
        "/set max_new_tokens 5",
        f"describe '{picture}' a",
        f"ask two '{picture}'",
        "/quit",
        "bla",
    ]
    said = talk(monkeypatch, capsys, folder, tmp_path / "drawings", *lines)
    first, option, description = said.out.splitlines()[:3]
    model = open_folder(folder, "cpu")
    assert first == str(tmp_path / "drawings" / "drawing-000003.png") and option == "max_new_tokens is 5"
    assert Image.open(first).tobytes() == model.draw("two cats", seed=3)[0].tobytes()
    assert description == model.describe([Image.open(picture)], "a", max_new_tokens=5)[0].strip()
    assert "16/16" in said.err and "paint" not in said.err  # positions drawn; nothing is read after /quit


def test_mistakes_are_told_and_the_conversation_goes_on(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    Image.new("RGB", (40, 40)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    lines = [
        "describe nowhere.png",
        f"describe {tmp_path}/notes.png",
        f"describe {tmp_path}/cut.png",
        "/set seed x",
        "/set speed 3",
        "ask 'two",
        "paint",
    ]
    errors = talk(monkeypatch, capsys, folder, tmp_path, *lines, "/help").err.splitlines()
    errors = [line for line in errors if line.startswith("error: ")]
    expected = [
        "'nowhere.png' cannot be read", "notes.png' cannot be read", "cut.png' cannot be read",
        "seed x: it takes a whole number", "no option 'speed'", "a quote is not closed", "'paint' is not understood",
    ]  # fmt: skip
    assert len(errors) == len(expected) and all(part in error for part, error in zip(expected, errors, strict=True))


def test_a_folder_that_is_no_export_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="is not an exported model"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="--device cuda:9 is not here"):
        open_folder(folder, "cuda:9")
