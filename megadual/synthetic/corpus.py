"""A small image-text corpus made from a seed: scenes of OpenMoji drawings, and what is said about them.

`python -m megadual.synthetic.corpus --output DIR --train 4000 --questions 2000 --edits 2000 --stories 500`

| files | what | format |
| --- | --- | --- |
| `train-*.tar` | pairs: captions say what is there, how many, how large, where, on which ground | webdataset |
| `questions-train-*.tar` | how many, what colour, where, what, yes or no; exact answers | LLaVA's, in webdataset |
| `edits-train-*.parquet` | add, remove, move, recolour the ground | InstructPix2Pix's columns |
| `stories-train-*.tar` | two to four sentences, each with a picture | interleaved webdataset |

Each has a held-out part (`heldout-*.tar`, ...) of `--heldout` samples, of which no picture is composed as one of the
training's. The scenes that a sample shows are in its KEY.json, those of parquet rows in the `.jsonl` beside the file;
`shown.json` has what the training parts show: the drawings' names, and what their scenes are composed as.
`broken-00000.tar` mixes good pairs with unusable samples. The same arguments give the same bytes, with any number of
`--workers`.
"""

import argparse
import json
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megadual.errors import UserError, command
from megadual.synthetic.broken import broken_members
from megadual.synthetic.drawings import check_packages
from megadual.synthetic.edits import draw_edit, edit_record, edit_row
from megadual.synthetic.files import Members, json_bytes, write_image_table, write_tar
from megadual.synthetic.questions import conversation_members, draw_conversation
from megadual.synthetic.scenes import PRESETS, Preset, Scene, draw_pair, pair_members
from megadual.synthetic.stories import draw_story, story_members

SAMPLES_PER_FILE = 1000
BROKEN_GOOD_PAIRS = 12
SHOWN = "shown.json"


@dataclass(frozen=True)
class Kind:
    """A kind of sample: how one is drawn, what it shows, what it is of, and how a file of them is written."""

    prefix: str  # of its files' names
    suffix: str
    draw: Callable[[random.Random, Preset], Any]
    scenes: Callable[[Any], list[Scene]]
    identity: Callable[[Any], Any]  # no two samples of a part have the same
    kinds: Callable[[Any], Iterable[str]]  # what the summary counts
    write: Callable[[Path, list[tuple[str, Any]], int], None]  # samples with their keys, the pictures' size


def _tar_writer(members: Callable[[str, Any, int], Members]) -> Callable[[Path, list[tuple[str, Any]], int], None]:
    def write(path: Path, samples: list[tuple[str, Any]], size: int) -> None:
        write_tar(path, [member for key, sample in samples for member in members(key, sample, size)])

    return write


def _write_edits(path: Path, samples: list[tuple[str, Any]], size: int) -> None:
    write_image_table(path, [edit_row(edit, size) for _, edit in samples])
    records = [{"key": f"{path.stem}-{row:06d}", **edit_record(edit)} for row, (_, edit) in enumerate(samples)]
    path.with_suffix(".jsonl").write_bytes(b"".join(json_bytes(record) + b"\n" for record in records))


KINDS = {
    "pairs": Kind(
        "", ".tar", draw_pair, lambda scene: [scene], str, lambda scene: [scene.kind],
        _tar_writer(pair_members),
    ),
    "questions": Kind(
        "questions-", ".tar", draw_conversation, lambda talk: [talk.scene], lambda talk: str(talk.scene),
        lambda talk: [question.kind for question in talk.questions], _tar_writer(conversation_members),
    ),
    "edits": Kind(
        "edits-", ".parquet", draw_edit, lambda edit: [edit.change.source, edit.change.result],
        lambda edit: str(edit.change), lambda edit: [edit.change.task],
        _write_edits,
    ),
    "stories": Kind(
        "stories-", ".tar", draw_story, lambda story: story.scenes, lambda story: tuple(story.sentences),
        lambda story: [f"{len(story.scenes)} pictures"], _tar_writer(story_members),
    ),
}  # fmt: skip


def distinct(kind: Kind, rng: random.Random, count: int, barred: set[str], preset: Preset) -> list:
    """`count` samples, no two of which are the same, that show no scene whose composition is barred."""
    samples: dict = {}
    while len(samples) < count:
        sample = kind.draw(rng, preset)
        if barred.isdisjoint(scene.composition for scene in kind.scenes(sample)):
            samples.setdefault(kind.identity(sample), sample)
    return list(samples.values())


def make_corpus(
    output: str | Path,
    train: int = 4000,
    heldout: int = 400,
    size: int = 64,
    seed: int = 0,
    questions: int = 0,
    edits: int = 0,
    stories: int = 0,
    scenes: str = "rich",
    workers: int = 1,
) -> dict:
    """Write the corpus's files, `shown.json` and `corpus.json`; returns the summary.

    train: pairs; questions, edits, stories: samples of these kinds, a conversation being one; heldout: samples in the
    held-out part of each kind that there is; size: pixels of a side; scenes: a name in PRESETS; workers: processes
    that draw the pictures.
    """
    preset = PRESETS[scenes]
    check_packages()
    counts = {"pairs": train, "questions": questions, "edits": edits, "stories": stories}
    if train < 1 or heldout < 1 or workers < 1 or min(counts.values()) < 0 or size < 16:
        raise UserError(
            f"train {train}, heldout {heldout} and workers {workers} must be at least 1, questions {questions}, edits "
            f"{edits} and stories {stories} at least 0, size {size} at least 16 pixels"
        )
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)

    broken = distinct(KINDS["pairs"], random.Random(f"broken {seed}"), BROKEN_GOOD_PAIRS, set(), preset)
    write_tar(output / "broken-00000.tar", broken_members(broken, size))
    barred = {scene.composition for scene in broken}
    parts: dict[str, dict[str, list]] = {name: {} for name, count in counts.items() if count}
    for part in ("heldout", "train"):
        for name in parts:
            rng = random.Random(f"{KINDS[name].prefix}{part} {seed}")
            count = heldout if part == "heldout" else counts[name]
            parts[name][part] = distinct(KINDS[name], rng, count, barred, preset)
        if part == "heldout":
            held_out = ((KINDS[name], sample) for name in parts for sample in parts[name][part])
            barred |= {scene.composition for kind, sample in held_out for scene in kind.scenes(sample)}

    summary: dict = {"size": size, "seed": seed, "scenes": scenes, "drawings": len(preset.names)}
    files: list[tuple[str, Path, list[tuple[str, Any]]]] = []  # kind, path, keyed samples
    for name, of in parts.items():
        kind, begun = KINDS[name], len(files)
        for part in ("train", "heldout"):
            keyed = [(f"{kind.prefix}{part}-{i:06d}", sample) for i, sample in enumerate(of[part])]
            for number, start in enumerate(range(0, len(keyed), SAMPLES_PER_FILE)):
                path = output / f"{kind.prefix}{part}-{number:05d}{kind.suffix}"
                files.append((name, path, keyed[start : start + SAMPLES_PER_FILE]))
        kinds = Counter(each for sample in of["train"] for each in kind.kinds(sample))
        lengths = {part: len(samples) for part, samples in sorted(of.items(), reverse=True)}
        written = [path.name for _, path, _ in files[begun:]]
        summary[name] = {**lengths, "files": written, "kinds": dict(sorted(kinds.items()))}  # of the training part
    total = sum(len(keyed) for *_, keyed in files)
    with tqdm(total=total, desc="corpus", unit="sample", mininterval=1) as bar:
        for written_now in _written(files, size, workers):
            bar.update(written_now)
    shown = [scene for name, of in parts.items() for sample in of["train"] for scene in KINDS[name].scenes(sample)]
    names = {group.name for scene in shown for group in scene.groups}
    compositions = {scene.composition for scene in shown}
    trained_on = {"names": sorted(names), "compositions": sorted(compositions)}
    (output / SHOWN).write_text(json.dumps(trained_on, indent=0) + "\n")
    (output / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _write(name: str, path: Path, keyed: list[tuple[str, Any]], size: int) -> int:
    KINDS[name].write(path, keyed, size)
    return len(keyed)


def _written(files: list[tuple[str, Path, list[tuple[str, Any]]]], size: int, workers: int) -> Iterator[int]:
    """Write the files; of each, as it is done, the number of its samples."""
    if workers == 1:
        yield from (_write(*file, size) for file in files)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_write, *file, size) for file in files]):
            yield done.result()


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for the files")
    parser.add_argument("--train", type=int, default=4000, help="training pairs")
    parser.add_argument("--questions", type=int, default=0, help="training conversations, each of 1 to 4 questions")
    parser.add_argument("--edits", type=int, default=0, help="training edits")
    parser.add_argument("--stories", type=int, default=0, help="training stories, each of 2 to 4 pictures")
    parser.add_argument("--heldout", type=int, default=400, help="held-out samples of each kind that there is")
    parser.add_argument(
        "--scenes", choices=PRESETS, default="rich", help="of all drawings in every arrangement; or simple: one "
        "or two of a dozen that are easily told apart, on few grounds"
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw the pictures (default: 1)")
    args = parser.parse_args(argv)
    summary = make_corpus(**vars(args))
    for name in KINDS:
        if name in summary:
            part = summary[name]
            print(f"{part['train']} + {part['heldout']} {name} in {len(part['files'])} files at {args.output}")


if __name__ == "__main__":
    main()
