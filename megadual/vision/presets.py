"""Named DualToken configurations: the two released tokenizers and the paper's three (paper sections A1 and A7).

The released ones narrow to 32 numbers per code; the paper's codes are as wide as SigLIP's hidden state and its pixel
branch has no shortcut. The SigLIP sizes are those of the published backbones.
"""

import copy
import dataclasses
import math
import re
from typing import Any

from transformers import SiglipConfig

from .config import DualTokenConfig, StreamConfig

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SIGLIP_TEXT = {"vocab_size": 32000, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
SIGLIP2_TEXT = {"vocab_size": 256000, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def _siglip(size: dict[str, int], image_size: int, patch_size: int, text: dict[str, int | None]) -> dict[str, Any]:
    text = {**size, **text, "max_position_embeddings": 64, "projection_size": size["hidden_size"]}
    vision = {**size, "image_size": image_size, "patch_size": patch_size}
    return SiglipConfig(text_config=text, vision_config=vision).to_dict()


# Attention heads of the published SigLIPs by hidden width: the one size that no weight's shape tells.
HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}


def siglip_from_shapes(shapes: dict[str, tuple[int, ...]], image_size: int) -> dict[str, Any]:
    """SiglipConfig.to_dict() from the shapes of a SiglipModel's weights; KeyError names what they don't tell.

    `image_size` in pixels counts where it gives the number of positions that the weights have.
    """

    def tower(name: str) -> dict[str, int]:
        intermediate, hidden = shapes[f"{name}.encoder.layers.0.mlp.fc1.weight"]
        layers = sum(bool(re.fullmatch(rf"{name}\.encoder\.layers\.\d+\.mlp\.fc1\.weight", key)) for key in shapes)
        if hidden not in HEADS:
            raise KeyError(f"attention heads of a tower of width {hidden}")
        return {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS[hidden],
        }

    patch = shapes["vision_model.embeddings.patch_embedding.weight"][-1]
    side = math.isqrt(shapes["vision_model.embeddings.position_embedding.weight"][0])
    vocabulary = shapes["text_model.embeddings.token_embedding.weight"][0]
    text = {
        **tower("text_model"),
        **(SIGLIP2_TEXT if vocabulary >= SIGLIP2_TEXT["vocab_size"] else SIGLIP_TEXT),
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "projection_size": shapes["text_model.head.weight"][0],
    }
    size = image_size if image_size // patch == side else side * patch
    vision = {**tower("vision_model"), "image_size": size, "patch_size": patch}
    return SiglipConfig(text_config=text, vision_config=vision).to_dict()


# SiglipConfig.to_dict() by the last part of the published name.
BACKBONES: dict[str, dict[str, Any]] = {
    "siglip-large-patch16-256": _siglip(LARGE, 256, 16, SIGLIP_TEXT),
    "siglip-so400m-patch14-384": _siglip(SO400M, 384, 14, SIGLIP_TEXT),
    "siglip2-so400m-patch16-256": _siglip(SO400M, 256, 16, SIGLIP2_TEXT),
    "siglip2-so400m-patch14-384": _siglip(SO400M, 384, 14, SIGLIP2_TEXT),
}


def released_streams(depth: int) -> dict[str, StreamConfig]:
    """Of the released tokenizers: pixel codes read layer 6 and 0.6 times layer 4, semantic ones layer 26."""
    return {
        "semantic": StreamConfig(layers=[26], feeds=["teacher"], depth=depth),
        "pixel": StreamConfig(
            layers=[6, 4], weights=[1.0, 0.6], feeds=["picture"], depth=depth, timing="per_depth"
        ),
    }  # fmt: skip


def paper_streams(depth: int, width: int, deep: int = 26) -> dict[str, StreamConfig]:
    """Of the paper's tokenizers: codes as wide as the hidden state, no shortcut."""
    return {
        "semantic": StreamConfig(layers=[deep], feeds=["teacher"], depth=depth, code_dim=width),
        "pixel": StreamConfig(layers=[6], feeds=["picture"], depth=depth, code_dim=width, timing="per_depth"),
    }


SO400M_256 = {"siglip": BACKBONES["siglip2-so400m-patch16-256"], "decoder_latent": 16, "decoder_attention": [16]}
SO400M_384 = {"decoder_latent": 24, "decoder_attention": [24]}

PRESETS: dict[str, dict[str, Any]] = {
    "siglip2-so400m-256-rvq4": {**SO400M_256, "streams": released_streams(4)},
    "siglip2-so400m-384-rvq8": {
        **SO400M_384,
        "siglip": BACKBONES["siglip2-so400m-patch14-384"],
        "streams": released_streams(8),
    },
    "siglip-l-256-d4": {
        "siglip": BACKBONES["siglip-large-patch16-256"],
        # the last layer that can be replaced is 23: at least one layer reads the quantised stream
        "streams": paper_streams(4, LARGE["hidden_size"], deep=23),
    },
    "siglip-so400m-384-d8": {
        **SO400M_384,
        "siglip": BACKBONES["siglip-so400m-patch14-384"],
        "streams": paper_streams(8, SO400M["hidden_size"]),
    },
    "siglip2-so400m-256-d8": {**SO400M_256, "streams": paper_streams(8, SO400M["hidden_size"])},
}


def changed(fields: dict[str, Any], streams: dict[str, dict] | None = None, **changes) -> DualTokenConfig:
    """The configuration of `fields` with others in their place; `streams` gives fields to change by stream."""
    fields = copy.deepcopy({**fields, **changes})
    for name, values in (streams or {}).items():
        fields["streams"][name] = dataclasses.replace(fields["streams"].get(name, StreamConfig()), **values)
    return DualTokenConfig(**fields)


def preset(name: str, **changes) -> DualTokenConfig:
    """The named configuration, `changed`; ValueError for an unknown name or sizes that do not fit."""
    if name not in PRESETS:
        raise ValueError(f"no DualToken preset '{name}'; there are {', '.join(PRESETS)}")
    return changed(PRESETS[name], **changes).check()
