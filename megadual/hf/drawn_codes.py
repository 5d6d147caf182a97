"""Images that keep the codes they were drawn with, so that a later turn reads these and not their pixels encoded anew.

Shape suffixes: N positions of an image, D a stream's code depth, C the depths of all streams together.
"""

import hashlib

import torch
from PIL import Image
from torch import Tensor

# Of Image.info, which PIL hands on to every copy, resized and cropped ones too: a dict, since several folders' code may
# be loaded. Its keys: `dualtoken`, the fingerprint of whose codes they are; `codes`, (N, D) by stream; `pixels`, a hash.
INFO = "megadual_codes"


def _pixels(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def keep_codes(image: Image.Image, dualtoken: str, codes: dict[str, Tensor]) -> Image.Image:
    """`image`, with the codes that it was decoded from."""
    image.info[INFO] = {"dualtoken": dualtoken, "codes": codes, "pixels": _pixels(image)}
    return image


def kept_codes(image: Image.Image, dualtoken: str | None, streams: list[str]) -> Tensor | None:
    """The codes (N, C) of `streams` that an image was drawn with; None where it has none of this DualToken's, or its
    pixels are no longer those that were drawn."""
    kept = image.info.get(INFO)
    if not kept or kept["dualtoken"] != dualtoken or not set(streams) <= set(kept["codes"]):
        return None
    return torch.cat([kept["codes"][name] for name in streams], dim=-1) if kept["pixels"] == _pixels(image) else None
