"""Benchmarks of drawing: which prompts their files hold, and where their own scorers look for the pictures.

A scorer is handed a folder of pictures, and some take every file there for one: `Benchmark.folder` holds nothing else.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megadual.errors import UserError

JPEG_QUALITY = 75  # PIL's default, which GenAI-Bench's own script saves with


@dataclass(frozen=True)
class Prompt:
    """One prompt of a benchmark: its place in the file, and what the file says of it beside the text."""

    index: int
    text: str
    key: str = ""
    about: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's prompts are read and its pictures named."""

    read: Callable[[Path], list[Prompt]]
    per_prompt: int  # images
    folder: str  # which its scorer is handed, below the output; {model} is the model's name
    name: Callable[[Prompt, int, int], str]  # (prompt, number, images per prompt) -> the picture's path in the folder
    wants: str  # of the prompts file, for people
    tiled: bool = False  # all images of a prompt are one picture, in rows of two
    beside: Callable[[Prompt], tuple[str, str]] | None = None  # a text file (path, contents) of each prompt

    def pictures(self, prompt: Prompt, per_prompt: int) -> list[str]:
        """The paths, within `folder`, of a prompt's pictures: one of each image, or of all."""
        return [self.name(prompt, number, per_prompt) for number in range(1 if self.tiled else per_prompt)]


def read_prompts(name: str, path: Path) -> list[Prompt]:
    """The prompts of a benchmark's own file or folder; UserError where it is not what that benchmark has."""
    benchmark = BENCHMARKS[name]
    try:
        prompts = benchmark.read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"--prompts '{path}': {name} takes {benchmark.wants}; {problem}") from error
    if not prompts:
        raise UserError(f"--prompts '{path}' holds no prompt; {name} takes {benchmark.wants}")
    return prompts


def _numbered(entries: Iterable[tuple[str, str, dict]]) -> list[Prompt]:
    """Prompts of (key, text, about)."""
    return [Prompt(index, text.strip(), key, about) for index, (key, text, about) in enumerate(entries)]


def _geneval(path: Path) -> list[Prompt]:
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return _numbered(("", line["prompt"], line) for line in lines)


def _genai(path: Path) -> list[Prompt]:
    return _numbered((key, entry["prompt"], {}) for key, entry in json.loads(path.read_text()).items())


def _dpg(path: Path) -> list[Prompt]:
    return _numbered((file.stem, file.read_text(), {}) for file in sorted(path.iterdir()) if file.suffix == ".txt")


def _wise(path: Path) -> list[Prompt]:
    """Of one of the three files, or of a folder with them."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    entries = [entry for file in files for entry in json.loads(file.read_text())]
    entries.sort(key=lambda entry: entry["prompt_id"])
    numbers = [entry["prompt_id"] for entry in entries]
    if len(set(numbers)) < len(numbers):
        raise ValueError("two prompts have the same prompt_id")
    return _numbered((str(entry["prompt_id"]), entry["Prompt"], {}) for entry in entries)


def _compbench(path: Path) -> list[Prompt]:
    lines = [line.split("\t")[0] for line in path.read_text().splitlines() if line.strip()]
    for line in lines:
        if "/" in line or "_" in line or len(line.encode()) > 240:
            raise ValueError(f"'{line[:60]}' can't be part of a file's name that is split at '_'")
    return _numbered(("", line, {}) for line in lines)


def _mjhq(path: Path) -> list[Prompt]:
    entries = json.loads(path.read_text()).items()
    return _numbered((key, entry["prompt"], {"category": entry["category"]}) for key, entry in entries)


BENCHMARKS = {
    "geneval": Benchmark(
        _geneval, 4, ".", lambda prompt, number, _: f"{prompt.index:05d}/samples/{number:04d}.png",
        "evaluation_metadata.jsonl: a JSON object a line, with `prompt`",
        beside=lambda prompt: (f"{prompt.index:05d}/metadata.jsonl", json.dumps(prompt.about) + "\n"),
    ),
    "genai-bench": Benchmark(
        _genai, 1, "{model}", lambda prompt, *_: f"{prompt.key}.jpeg",
        'genai_image.json: {"00000": {"prompt": ...}, ...}',
    ),
    "dpg": Benchmark(
        _dpg, 4, "images", lambda prompt, *_: f"{prompt.key}.png", "a folder of .txt files, a prompt each", tiled=True,
    ),
    "wise": Benchmark(
        _wise, 1, "images", lambda prompt, *_: f"{prompt.key}.png",
        "cultural_common_sense.json or another of the three files, or a folder of them: entries with `prompt_id` and "
        "`Prompt`",
    ),
    "t2i-compbench": Benchmark(  # numbers go on from prompt to prompt: scorers sort by them
        _compbench, 10, "samples", lambda prompt, number, per: f"{prompt.text}_{prompt.index * per + number:06d}.png",
        "color_val.txt or another: a prompt a line",
    ),
    "mjhq": Benchmark(
        _mjhq, 1, "images", lambda prompt, *_: f"{prompt.about['category']}/{prompt.key}.png",
        'meta_data.json: {"ID": {"category": ..., "prompt": ...}, ...}',
    ),
}  # fmt: skip
