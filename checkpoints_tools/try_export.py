"""Use an exported folder on held-out data: describe, draw, answer, edit. Needs nothing of megadual.

`python checkpoints_tools/try_export.py --model DIR --data 'runs/demo/corpus/heldout-*.tar' --output runs/demo/use`

Writes pictures, and what belongs to them:
- descriptions.json (key, file, caption, description) and drawings.json (key, file, caption, seed), of different pairs;
- with `--questions` (webdataset tars in LLaVA's format) answers.json (key, file, kind, question, answer, said, right);
  each question is asked by itself, and an answer is right that equals the one in the file;
- with `--edits` (parquet in InstructPix2Pix's columns) edits.json (key, instruction, source, drawn, true, seed).
"""

import argparse
import glob
import io
import itertools
import json
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM

BATCH = 8  # images at once


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def open_image(data: bytes, what: str) -> Image.Image:
    """The decoded image; ends the program where it can't be read."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        return image
    except Exception as error:  # of PIL's decoders: whatever unpacking wrong bytes leads to
        sys.exit(f"error: {what} can't be read: {error}")


def samples(option: str, pattern: str, wanted: str) -> Iterator[tuple[str, Image.Image, bytes]]:
    """(key, image, the member KEY.`wanted`) of the webdataset tars that match a glob; a broken one ends the program."""
    for path in sorted(glob.glob(pattern)):
        found: dict[str, dict[str, bytes]] = {}
        for name, data in members(option, path):
            folder, slash, file = name.rpartition("/")
            stem, _, extension = file.partition(".")
            key = folder + slash + stem
            sample = found.setdefault(key, {})
            sample["image" if extension in ("png", "jpg", "jpeg", "webp") else extension] = data
            if "image" in sample and wanted in sample:
                yield key, open_image(sample["image"], f"{option}: sample '{key}' of '{path}'"), sample[wanted]
                del found[key]


def members(option: str, path: str) -> Iterator[tuple[str, bytes]]:
    """Name and contents of a tar's files: folders and links are passed over."""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isreg():
                    yield member.name, tar.extractfile(member).read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        sys.exit(f"error: {option}: '{path}' can't be read as a tar: {error}")


def edits(pattern: str) -> Iterator[tuple[str, Image.Image, str, Image.Image]]:
    """(key, source, instruction, true result) of the parquet files that match a glob."""
    from pyarrow import parquet

    for path in sorted(glob.glob(pattern)):
        for i, row in enumerate(parquet.read_table(path).to_pylist()):
            source, true = (
                open_image(row[column]["bytes"], f"--edits: {column} of row {i} of '{path}'")
                for column in ("original_image", "edited_image")
            )
            yield f"{Path(path).stem}-{i:06d}", source, row["edit_prompt"], true


def first(option: str, pattern: str, found: Iterator, count: int) -> list:
    """The first `count` of what was found; ends the program where there are fewer."""
    taken = list(itertools.islice(found, count))
    if len(taken) < count:
        sys.exit(f"error: {option} '{pattern}' has {len(taken)} samples, {count} are asked for")
    return taken


def open_model(folder: str):
    """The model; ends the program where it can't be opened, or the folder lacks a part of it."""
    missing = [
        name for name in ("config.json", "generation_config.json", "tokenizer.json") if not is_json(folder, name)
    ]
    if missing:
        sys.exit(f"error: --model '{folder}': {', '.join(missing)} is missing or not JSON")
    try:
        model, told = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        lacking = sorted(name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in told[kind])
        if lacking:
            raise ValueError(f"its weights do not fit its config.json: {', '.join(map(str, lacking[:4]))}")
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:  # of the folder's code, or of transformers
        reason = " ".join(str(error).split())[:400]
        sys.exit(f"error: --model '{folder}' can't be opened: {type(error).__name__}: {reason}")


def is_json(folder: str, name: str) -> bool:
    try:
        return isinstance(json.loads(Path(folder, name).read_text()), dict)
    except (OSError, ValueError):
        return False


class Trial:
    """The model at work; each method saves pictures in `output` and returns records of them."""

    def __init__(self, model, output: Path, seed: int, **sampling: float):
        self.model, self.output, self.seed, self.sampling = model, output, seed, sampling

    def describe(self, pairs: list) -> Iterator[dict]:
        for i, (key, image, caption) in enumerate(pairs):
            (description,) = self.model.describe([image])
            caption = caption.decode().strip()
            file = self._save(image, f"described-{i:03d}")
            yield {"key": key, "file": file, "caption": caption, "description": description.strip()}

    def draw(self, pairs: list) -> Iterator[dict]:
        """Image i depends on seed + i and its caption, not on its batch; so below."""
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            captions = [caption.decode().strip() for *_, caption in batch]
            images = self.model.draw(captions, **self.sampling, seed=self.seed + start)
            for i, ((key, *_), caption, image) in enumerate(zip(batch, captions, images, strict=True), start):
                file = self._save(image, f"drawing-{i:03d}")
                yield {"key": key, "file": file, "caption": caption, "seed": self.seed + i}

    def answer(self, conversations: list) -> Iterator[dict]:
        for start in range(0, len(conversations), BATCH):
            images, asked = [], []
            for i, (key, image, described) in enumerate(conversations[start : start + BATCH], start):
                file, conversation = self._save(image, f"asked-{i:03d}"), json.loads(described)
                turns = [turn["value"].replace("<image>", "").strip() for turn in conversation["conversations"]]
                kinds = conversation.get("kinds", ["question"] * (len(turns) // 2))
                for kind, question, answer in zip(kinds, turns[::2], turns[1::2], strict=True):
                    images.append(image)
                    asked.append({"key": key, "file": file, "kind": kind, "question": question, "answer": answer})
            for about, said in zip(asked, self.model.ask(images, [each["question"] for each in asked]), strict=True):
                said = said.strip()
                yield {**about, "said": said, "right": said.casefold() == about["answer"].casefold()}

    def edit(self, rows: list) -> Iterator[dict]:
        for start in range(0, len(rows), BATCH):
            keys, sources, instructions, trues = zip(*rows[start : start + BATCH], strict=True)
            drawn = self.model.edit(list(sources), list(instructions), **self.sampling, seed=self.seed + start)
            for i, (key, instruction, *images) in enumerate(
                zip(keys, instructions, sources, drawn, trues, strict=True), start
            ):
                pictures = zip(("source", "drawn", "true"), images, strict=True)
                files = {name: self._save(image, f"edit-{i:03d}-{name}") for name, image in pictures}
                yield {"key": key, "instruction": instruction, **files, "seed": self.seed + i}

    def _save(self, image: Image.Image, name: str) -> str:
        image.save(self.output / f"{name}.png")
        return f"{name}.png"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported folder")
    parser.add_argument("--data", required=True, help="glob of webdataset .tar files of pairs")
    parser.add_argument("--questions", help="glob of webdataset .tar files of conversations")
    parser.add_argument("--edits", help="glob of .parquet files of edits")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--describe", type=int, default=8, help="images to describe")
    parser.add_argument("--draw", type=int, default=8, help="captions to draw")
    parser.add_argument("--answer", type=int, default=100, help="conversations whose questions are asked")
    parser.add_argument("--edit", type=int, default=8, help="edits to make")
    parser.add_argument("--cfg-scale", type=float, default=3.0, help="guidance of drawings and edits")
    parser.add_argument("--temperature", type=float, default=1.0, help="that their codes are drawn at")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    pairs = first("--data", args.data, samples("--data", args.data, "txt"), args.describe + args.draw)
    work: dict[str, tuple[Callable, list]] = {
        "descriptions": (Trial.describe, pairs[: args.describe]),
        "drawings": (Trial.draw, pairs[args.describe :]),
    }
    if args.questions:
        found = samples("--questions", args.questions, "json")
        work["answers"] = (Trial.answer, first("--questions", args.questions, found, args.answer))
    if args.edits:
        work["edits"] = (Trial.edit, first("--edits", args.edits, edits(args.edits), args.edit))

    args.output.mkdir(parents=True, exist_ok=True)
    sampling = {"cfg_scale": args.cfg_scale, "temperature": args.temperature}
    trial = Trial(open_model(args.model), args.output, args.seed, **sampling)
    done = []
    for name, (use, given) in work.items():
        records = list(tqdm(use(trial, given), desc=name, mininterval=1 if sys.stderr.isatty() else 10))
        (args.output / f"{name}.json").write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n")
        done.append(f"{len(records)} {name}")
    print(f"{', '.join(done)} in {args.output}")


if __name__ == "__main__":
    main()
