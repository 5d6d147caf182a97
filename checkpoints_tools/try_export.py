"""Use an exported folder: describe held-out images, and draw from held-out captions. Needs nothing of megadual.

`python checkpoints_tools/try_export.py --model DIR --data 'runs/demo/corpus/heldout-*.tar' --output runs/demo/use`

Writes described-NNN.png and descriptions.json (key, file, caption, description), drawing-NNN.png and
drawings.json (key, file, caption, seed). The images described and the captions drawn are different pairs.
"""

import argparse
import glob
import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM

BATCH = 8  # drawings made at once


def read_pairs(pattern: str, count: int) -> list[tuple[str, Image.Image, str]]:
    """(key, image, caption) of the first `count` samples of the webdataset tars that match.

    Ends the program where one can't be read.
    """
    pairs = []
    for path in sorted(glob.glob(pattern)):
        with tarfile.open(path) as tar:
            found: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                sample = found.setdefault(key, {})
                sample["image" if extension in ("png", "jpg", "jpeg") else extension] = tar.extractfile(member).read()
                if "image" in sample and "txt" in sample:
                    try:
                        image = Image.open(io.BytesIO(sample["image"]))
                        image.load()
                        pairs.append((key, image, sample["txt"].decode().strip()))
                    except Exception as error:  # of PIL's decoders: whatever unpacking wrong bytes leads to
                        sys.exit(f"error: --data: sample '{key}' of '{path}' can't be read: {error}")
                    del found[key]
                    if len(pairs) == count:
                        return pairs
    return pairs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Describe and draw with an exported folder.")
    parser.add_argument("--model", required=True, help="exported folder")
    parser.add_argument("--data", required=True, help="glob of webdataset .tar files")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--describe", type=int, default=8, help="images to describe")
    parser.add_argument("--draw", type=int, default=8, help="captions to draw")
    parser.add_argument("--cfg-scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    pairs = read_pairs(args.data, args.describe + args.draw)
    if len(pairs) < args.describe + args.draw:
        sys.exit(f"error: --data '{args.data}' has {len(pairs)} pairs, {args.describe} + {args.draw} are asked for")
    args.output.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True).eval()

    descriptions, drawings = [], []
    described, drawn = pairs[: args.describe], pairs[args.describe :]
    with tqdm(total=len(pairs), unit="image", mininterval=1 if sys.stderr.isatty() else 10) as bar:
        for i, (key, image, caption) in enumerate(described):
            file = f"described-{i:03d}.png"
            image.save(args.output / file)
            (description,) = model.describe([image])
            descriptions.append({"key": key, "file": file, "caption": caption, "description": description.strip()})
            bar.update()
        for start in range(0, len(drawn), BATCH):  # image i depends on seed + i and its caption, not on its batch
            batch = drawn[start : start + BATCH]
            captions = [caption for _, _, caption in batch]
            images = model.draw(captions, cfg_scale=args.cfg_scale, seed=args.seed + start)
            for i, ((key, _, caption), image) in enumerate(zip(batch, images, strict=True), start):
                image.save(args.output / f"drawing-{i:03d}.png")
                drawings.append({"key": key, "file": f"drawing-{i:03d}.png", "caption": caption, "seed": args.seed + i})
            bar.update(len(batch))
    for name, records in (("descriptions", descriptions), ("drawings", drawings)):
        (args.output / f"{name}.json").write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    print(f"{len(descriptions)} descriptions and {len(drawings)} drawings in {args.output}")


if __name__ == "__main__":
    main()
