"""Small shard sets of random codes, for tests."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megadual.streams import SPEAKERS, Document, ImageUse, Marks, Role, SpecialIds, Stream, TurnBit

SPECIAL = Marks(
    end_of_text=0, image=1, image_start=2, image_end=3, image_gen_start=4, image_gen_end=5, im_start=248, im_end=249,
    newline=np.array([250]), headers={role: np.array([248, 250 + role, 250]) for role in SPEAKERS},
)  # fmt: skip
STREAMS = (Stream("semantic", 2, 64, 8), Stream("pixel", 2, 64, 8))


def random_documents(
    count: int, seed: int = 0, grid: tuple[int, int] = (2, 3), streams: Iterable[Stream] = STREAMS,
    vocabulary: int = 256, caption: tuple[int, int] = (1, 12), images: tuple[int, int] = (1, 1),
    special: SpecialIds = SPECIAL,
) -> list[Document]:  # fmt: skip
    """`count` documents of `images` (least, most) images, each followed by a caption of (least, most) tokens.

    A document without images is one caption; one of one image is a pair.
    """
    random = np.random.default_rng(seed)
    documents = []
    for i in range(count):
        number = int(random.integers(images[0], images[1] + 1))
        text = [] if number else [random.integers(6, vocabulary, random.integers(caption[0], caption[1] + 1))]
        for _ in range(number):
            text.append([special.image])
            text.append(random.integers(6, vocabulary, random.integers(caption[0], caption[1] + 1)))
        positions, text_ids = number * grid[0] * grid[1], np.concatenate(text).astype(np.uint32)
        role = Role.CAPTION if number == 1 else Role.DOCUMENT
        documents.append(
            Document(
                key=f"random-{seed}/{i:06d}",
                text_ids=text_ids,
                turns=np.array([[len(text_ids), role, TurnBit.LOSS]], dtype=np.uint32),
                codes={
                    stream.name: random.integers(0, stream.codebook_size, (positions, stream.depth), dtype=np.uint16)
                    for stream in streams
                },
                grids=np.array([grid] * number, dtype=np.uint16).reshape(number, 2),
                meta={"source": f"random-{seed}"},
            )
        )
    return documents


def random_conversations(
    count: int, seed: int = 0, grid: tuple[int, int] = (2, 3), streams: Iterable[Stream] = STREAMS,
    vocabulary: int = 240, text: tuple[int, int] = (1, 4), special: SpecialIds = SPECIAL,
) -> list[Document]:  # fmt: skip
    """`count` documents of what `random_documents` has none of, in turn: questions about an image, an edit, a drawing
    that is talked about, a pair of three captions; each text of (least, most) tokens.
    """
    random = np.random.default_rng(seed)
    system, user, assistant = Role.SYSTEM, Role.USER, Role.ASSISTANT
    look, draw, droppable = ImageUse.LOOKED_AT, ImageUse.DRAWN, ImageUse.DROPPABLE
    says, may_drop, asks = TurnBit.LOSS, TurnBit.DROPPABLE, TurnBit(0)
    # Of each turn the role, its bits and its parts: an image's use, or None for some text.
    kinds = [
        [(system, asks, [None]), (user, asks, [look, None]), (assistant, says, [None]),
         (user, asks, [None]), (assistant, says, [None])],
        [(user, may_drop, [look | droppable, None]), (assistant, says, [draw])],
        [(user, may_drop, [None]), (assistant, says, [None, draw]), (user, asks, [None]), (assistant, says, [None])],
        [(Role.CAPTION, says, [ImageUse.EITHER, None]), (Role.CAPTION, says, [None]), (Role.CAPTION, says, [None])],
    ]  # fmt: skip
    documents = []
    for i in range(count):
        text_ids, turns, uses = [], [], []
        for role, bits, parts in kinds[i % len(kinds)]:
            for use in parts:
                text_ids += (
                    [special.image]
                    if use
                    else random.integers(6, vocabulary, random.integers(text[0], text[1] + 1)).tolist()
                )
                uses += [use] if use else []
            turns.append((len(text_ids), role, bits))
        positions = len(uses) * grid[0] * grid[1]
        codes = {
            stream.name: random.integers(0, stream.codebook_size, (positions, stream.depth), dtype=np.uint16)
            for stream in streams
        }
        grids = np.array([grid] * len(uses), dtype=np.uint16)
        documents.append(
            Document(
                f"conversation-{seed}/{i:06d}", np.array(text_ids, dtype=np.uint32), codes, grids, {},
                np.array(turns, dtype=np.uint32), np.array(uses, dtype=np.uint8),
            )
        )  # fmt: skip
    return documents


def write_shard_set(
    root: str | Path, documents: list[Document], dualtoken: dict | None = None, text_tokenizer: dict | None = None,
    shard_bytes: int = 1 << 20, marks: Marks = SPECIAL,
) -> Path:  # fmt: skip
    """Write `documents` as the pipeline would, with one folder of shards; returns `root`."""
    from megadual.data.mds import NotedLengths, document_writer  # reading a set needs no mosaicml-streaming

    root = Path(root)
    lengths = NotedLengths(marks)
    with document_writer(root / "part", documents[0].codes, shard_bytes) as writer:
        for document in documents:
            writer.write(document.row())
            lengths.add(document)
    noted = lengths.save(root / "part")
    index = json.loads((root / "part" / "index.json").read_text())
    written = [shard["raw_data"]["basename"] for shard in index["shards"]]
    for shard in index["shards"]:
        shard["raw_data"]["basename"] = f"part/{shard['raw_data']['basename']}"
    (root / "index.json").write_text(json.dumps(index))
    manifest = {
        "format": 1,
        "documents": len(documents),
        "images": sum(len(document.grids) for document in documents),
        "positions": sum(document.positions for document in documents),
        "shards": [{"folder": "part", "files": _hashed(root / "part", [*written, *noted])}],
        "dualtoken": {"fingerprint": "none", "path": "random", **(dualtoken or {})},
        "text_tokenizer": {"fingerprint": "none", "path": "random", **(text_tokenizer or {})},
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def _hashed(folder: Path, names: list[str]) -> list[dict]:
    return [{"file": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()} for name in names]
