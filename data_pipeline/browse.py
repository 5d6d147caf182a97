"""Look at a shard set: print its manifest, and make a page of samples decoded back to images beside their text.

`python data_pipeline/browse.py SET --output page.html -n 32`
"""

import argparse
import base64
import contextlib
import io
import json
import sys
import tempfile
from collections import Counter
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout goes before an installed package

from megadual.data.cache import Cache  # noqa: E402
from megadual.data.mds_reader import ShardSet  # noqa: E402
from megadual.errors import UserError, command  # noqa: E402
from megadual.streams import Document, ImageUse, Role, SpecialIds, TurnBit  # noqa: E402
from megadual.text import fingerprint, load_text_tokenizer  # noqa: E402
from megadual.vision import DualToken  # noqa: E402
from megadual.vision.tokenizer import to_image  # noqa: E402

DOCUMENTS_FOR_STATISTICS = 2000
SHARDS_FETCHED = 8  # of a set at a URL: they are large, and documents are looked at from all over them
REASONS_SHOWN = 20

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: #8884; width: 10rem; } .bar i { display: block; height: .7rem; background: #3a7bd5; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
article { border: 1px solid #8886; border-radius: 6px; padding: .7rem; overflow-wrap: anywhere; }
article img { width: 100%; image-rendering: pixelated; border-radius: 3px; display: block; }
.turn { border-left: 3px solid #8886; padding-left: .6rem; margin-bottom: .6rem; }
.turn.loss { border-color: #2a9d5c; } .loss > div, .key .loss { background: #2a9d5c33; }
.turn.droppable > div, .key .droppable, figure.droppable { border: 1px dashed #c77d0a; }
.turn > div { white-space: pre-wrap; padding: 0 .2rem; }
figure { margin: .3rem 0; padding: 4px; border: 1px solid #8886; border-radius: 5px; }
figure.drawn { border: 3px solid #2a9d5c; } figure.drawn.droppable { border-style: dashed; }
.key span { padding: 0 .3rem; border-radius: 3px; } .key .drawn { border: 3px solid #2a9d5c; }
small, figcaption, .turn > b { opacity: .7; font-size: .8rem; }
"""


# How the bits of a turn and the uses of an image are shown.
KEY = (
    "<p class=key><span class=loss>Has a loss</span> <span class=droppable>may be dropped, for guidance</span> "
    "<span class=drawn>is drawn</span></p>"
)
USES = {
    ImageUse.LOOKED_AT: ("looked", "looked at"),
    ImageUse.DRAWN: ("drawn", "drawn"),
    ImageUse.EITHER: ("either", "drawn or looked at"),
}


def choose(total: int, count: int, seed: int) -> list[int]:
    """`count` of `total` document numbers, in order."""
    return sorted(np.random.default_rng(seed).choice(total, min(count, total), replace=False).tolist())


def code_statistics(documents: list[Document], codebook_sizes: dict[str, int]) -> list[dict]:
    """For each stream and depth: codes, the share of the codebook they use, perplexity exp(entropy)."""
    rows = []
    for stream, codebook_size in codebook_sizes.items():
        codes_ND = np.concatenate([document.codes[stream] for document in documents])
        for depth in range(codes_ND.shape[1]):
            counts = np.bincount(codes_ND[:, depth], minlength=codebook_size)
            shares = counts[counts > 0] / max(counts.sum(), 1)
            rows.append(
                {
                    "stream": stream,
                    "depth": depth,
                    "codes": int(counts.sum()),
                    "used": float((counts > 0).mean()),
                    "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
                }
            )
    return rows


@torch.inference_mode()
def decode_images(document: Document, dualtoken: DualToken) -> list[Image.Image]:
    """The document's images, from their codes."""
    images, start = [], 0
    for rows, columns in document.grids.astype(int).tolist():
        end = start + rows * columns
        codes = {
            stream: torch.from_numpy(codes_ND[start:end].astype(np.int64)).view(1, rows, columns, -1)
            for stream, codes_ND in document.codes.items()
        }
        images.append(to_image(dualtoken.decode(codes)[0]))
        start = end
    return images


def _figure(image: Image.Image, use: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    name, words = USES[ImageUse(use & ImageUse.EITHER)]
    droppable = bool(use & ImageUse.DROPPABLE)
    return (
        f'<figure class="{name}{" droppable" * droppable}">'
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        f"<figcaption>{words}{', may be dropped' * droppable}</figcaption></figure>"
    )


def turns_as_html(document: Document, images: list[Image.Image], tokenizer, image_id: int) -> str:
    """Who speaks, in order; green what has a loss, dashed what may be dropped."""
    figures = map(_figure, images, document.image_use.tolist())
    turns, begin, shown = document.turns.tolist(), 0, []
    for number, (end, role, bits) in enumerate(turns, 1):
        ids, name = document.text_ids[begin:end], Role(role).name.lower()
        parts = []
        for piece in np.split(ids, np.sort(np.concatenate([at := np.flatnonzero(ids == image_id), at + 1]))):
            if len(piece) and piece[0] == image_id:
                parts.append(next(figures))
            elif len(piece):
                parts.append(f"<div>{escape(tokenizer.decode(piece))}</div>")
        if role == Role.CAPTION and len(turns) > 1:
            name += f" {number} of {len(turns)}"
        marks = [bit.name.lower() for bit in TurnBit if bits & bit]
        shown.append(f'<section class="{" ".join(["turn", *marks])}"><b>{name}</b>{"".join(parts)}</section>')
        begin = end
    return "".join(shown)


def _article(document: Document, dualtoken: DualToken, tokenizer, image_id: int) -> str:
    turns = turns_as_html(document, decode_images(document, dualtoken), tokenizer, image_id)
    return f"<article>{turns}<small>{escape(document.key)} {escape(json.dumps(document.meta))}</small></article>"


def _table(rows: list[tuple], head: tuple = ()) -> str:
    """Numbers are set right; a float is a share and drawn as a bar."""

    def cell(value, tag: str = "td") -> str:
        if isinstance(value, float):
            return (
                f'<{tag} class="n">{value:.1%}</{tag}><td><div class="bar"><i style="width:{value:.1%}"></i></div></td>'
            )
        if isinstance(value, int):
            return f'<{tag} class="n">{value:,}</{tag}>'
        return f"<{tag}>{escape(str(value))}</{tag}>"

    lines = ["".join(cell(name, "th") for name in head)] if head else []
    return (
        "<table>"
        + "".join(f"<tr>{line}</tr>" for line in lines + ["".join(map(cell, row)) for row in rows])
        + "</table>"
    )


def facts(manifest: dict) -> list[tuple[str, str]]:
    """The manifest in a few lines."""
    dualtoken, text_tokenizer = manifest["dualtoken"], manifest["text_tokenizer"]
    (rows, columns), streams = dualtoken["grid"], dualtoken["streams"]
    reasons = dict(manifest["left_out"])
    for part in ("image", "caption"):
        reasons |= {f"{part}: {reason}": count for reason, count in manifest[f"left_out_{part}s"].items()}
    return [
        *((name, f"{manifest[name]:,}") for name in ("samples", "documents", "images", "positions", "text_ids")),
        ("quarantined", f"{manifest['quarantined']:,}"),
        ("left out", ", ".join(f"{reason} {count:,}" for reason, count in reasons.items()) or "none"),
        ("failed inputs", f"{len(manifest['failed_inputs']):,}"),
        ("shards", f"{len(manifest['shards']):,}"),
        ("image tokenizer", f"{dualtoken['path']} ({dualtoken['fingerprint'][:12]}), {rows} x {columns} positions, "
                            + ", ".join(f"{s['name']} {s['depth']} codes of {s['codebook_size']:,}" for s in streams)),
        ("text tokenizer", f"{text_tokenizer['path']} ({text_tokenizer['fingerprint'][:12]})"),
    ]  # fmt: skip


def make_page(shards: ShardSet, dualtoken: DualToken, tokenizer, count: int, seed: int) -> str:
    """The set's page as HTML that needs no other file."""
    manifest = shards.manifest
    image_id = SpecialIds.of(tokenizer).image
    within = (
        range(len(shards)) if shards.here else shards.documents_of(choose(len(shards.shards), SHARDS_FETCHED, seed))
    )
    shards.expect(within)
    measured = [shards[within[i]] for i in choose(len(within), DOCUMENTS_FOR_STATISTICS, seed)]
    statistics = [
        (row["stream"], row["depth"], row["codes"], row["used"], f"{row['perplexity']:,.0f}")
        for row in code_statistics(measured, {s["name"]: s["codebook_size"] for s in manifest["dualtoken"]["streams"]})
    ]
    chosen = tqdm([within[i] for i in choose(len(within), count, seed)], desc="decode", unit="document", mininterval=1)
    samples = "".join(_article(shards[i], dualtoken, tokenizer, image_id) for i in chosen)
    reasons = Counter(json.loads(line)["reason"] for line in shards.read("quarantine.jsonl").splitlines())
    quarantine = _table([(count, reason) for reason, count in reasons.most_common(REASONS_SHOWN)])
    config = escape(json.dumps(manifest["config"], indent=2, ensure_ascii=False))
    title = escape(shards.root)
    return (
        f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>Shard set {title}</h1>{_table(facts(manifest))}"
        f"<h2>Codes of {len(measured):,} documents</h2>"
        f"{_table(statistics, ('stream', 'depth', 'codes', 'codebook used', '', 'perplexity'))}"
        f"<h2>Samples, images decoded from their codes</h2>{KEY}<div class=samples>{samples}</div>"
        f"<h2>Quarantine: the most frequent reasons</h2>{quarantine if reasons else 'empty'}"
        f"<h2>Config</h2><pre>{config}</pre>"
    )


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print a shard set's manifest and make a page of its samples.")
    parser.add_argument("set", help="folder or URL of the set")
    parser.add_argument("--output", default="page.html", help="the page")
    parser.add_argument("-n", type=int, default=32, help="samples on the page")
    parser.add_argument("--seed", type=int, default=0, help="which samples")
    parser.add_argument("--dualtoken", help="folder of the image tokenizer, where the manifest's is not here")
    parser.add_argument("--text-tokenizer", help="folder of the text tokenizer, likewise")
    parser.add_argument("--cache", help="folder into which shards of a set at a URL come; none: a temporary one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() if args.cache is None else contextlib.nullcontext(args.cache) as cache:
        browse(args, ShardSet(args.set, cache=Cache(cache)))


def browse(args: argparse.Namespace, shards: ShardSet) -> None:
    """Print the manifest and make the page."""
    try:
        lines = facts(shards.manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{shards.root}/manifest.json' is not what tokenize.py writes ({error!r})") from error
    for name, value in lines:
        print(f"{name:16} {value}")
    dualtoken_path = args.dualtoken or shards.manifest["dualtoken"]["path"]
    if not Path(dualtoken_path).is_dir():
        raise UserError(f"the set's image tokenizer '{dualtoken_path}' is not here; give its folder as --dualtoken")
    text_path = args.text_tokenizer or shards.manifest["text_tokenizer"]["path"]
    dualtoken, tokenizer = DualToken.from_pretrained(dualtoken_path).eval(), load_text_tokenizer(text_path)
    shards.check(dualtoken.fingerprint(), dualtoken_path, fingerprint(tokenizer), text_path)
    page = make_page(shards, dualtoken, tokenizer, args.n, args.seed)
    Path(args.output).write_text(page, encoding="utf-8")
    print(f"page of {min(args.n, len(shards))} samples: {args.output}")


if __name__ == "__main__":
    main()
