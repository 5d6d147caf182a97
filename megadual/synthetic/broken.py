"""Samples that no reader can use, each for another reason."""

import struct
import zlib

from megadual.synthetic.files import png_bytes
from megadual.synthetic.scenes import Scene, pair_members, render


def _bomb() -> bytes:
    """A PNG of a few bytes whose header says 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def broken_members(scenes: list[Scene], size: int) -> list[tuple[str, bytes]]:
    """Good samples with one of each kind of unusable sample between them."""
    image = png_bytes(render(scenes[0], size))
    caption = scenes[0].caption.encode()
    bad = {
        "truncated-image": {"png": image[: len(image) // 2], "txt": caption},
        "missing-caption": {"png": image},
        "empty-caption": {"png": image, "txt": b" \n"},
        "caption-not-utf8": {"png": image, "txt": b"\xff\xfe\xfa"},
        "zero-byte-image": {"png": b"", "txt": caption},
        "not-an-image": {"png": b"this is text, not an image", "txt": caption},
        "missing-image": {"txt": caption},
        "huge-image": {"png": _bomb(), "txt": caption},
    }
    members, bad = [], list(bad.items())
    for index, scene in enumerate(scenes):
        members += pair_members(f"good-{index:05d}", scene, size)
        if index < len(bad):
            key, parts = bad[index]
            members += [(f"{key}.{suffix}", data) for suffix, data in parts.items()]
    return members
