"""The one table of weight names and layouts: the trainer's (megatron-core's) on the left, Hugging Face's on the right.

Both directions read it. `*` stands for the same text on both sides.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What the layouts depend on."""

    heads: int
    kv_heads: int
    text_size: int  # text ids that exist
    padded_text_size: int  # rows of the trainer's table

    def __post_init__(self):
        assert self.heads % self.kv_heads == 0 and self.text_size <= self.padded_text_size


@dataclass(frozen=True)
class Layout:
    """How one tensor of the trainer becomes the tensors of an entry, as views where it can be, and back."""

    split: Callable[[Tensor, Sizes], list[Tensor]]
    merge: Callable[[list[Tensor], Sizes], Tensor]


def _split_qkv(packed: Tensor, sizes: Sizes) -> list[Tensor]:
    """Rows lie by KV group: the group's query heads, its key, its value."""
    per_group = sizes.heads // sizes.kv_heads
    groups = packed.unflatten(0, (sizes.kv_heads, per_group + 2, -1))
    return [part.flatten(0, 2) for part in groups.split([per_group, 1, 1], dim=1)]


def _merge_qkv(parts: list[Tensor], sizes: Sizes) -> Tensor:
    width = parts[1].size(0) // sizes.kv_heads
    return torch.cat([part.unflatten(0, (sizes.kv_heads, -1, width)) for part in parts], dim=1).flatten(0, 2)


def _pad_vocabulary(parts: list[Tensor], sizes: Sizes) -> Tensor:
    table = parts[0]
    return torch.cat([table, table.new_zeros(sizes.padded_text_size - len(table), *table.shape[1:])])


SAME = Layout(lambda tensor, _: [tensor], lambda parts, _: parts[0])
QKV = Layout(_split_qkv, _merge_qkv)
GATE_UP = Layout(lambda tensor, _: list(tensor.chunk(2)), lambda parts, _: torch.cat(parts))
VOCABULARY = Layout(lambda tensor, sizes: [tensor[: sizes.text_size]], _pad_vocabulary)

_QKV_NAMES = [f"model.layers.*.self_attn.{name}_proj.*" for name in "qkv"]

TABLE: list[tuple[str, list[str], Layout]] = [
    ("embedding.word_embeddings.weight", ["model.embed_tokens.weight"], VOCABULARY),
    ("embedding.projector.*", ["projector.*"], SAME),
    ("decoder.layers.*.input_layernorm.weight", ["model.layers.*.input_layernorm.weight"], SAME),
    ("decoder.layers.*.self_attention.linear_qkv.*", _QKV_NAMES, QKV),
    ("decoder.layers.*.self_attention.linear_proj.weight", ["model.layers.*.self_attn.o_proj.weight"], SAME),
    ("decoder.layers.*.pre_mlp_layernorm.weight", ["model.layers.*.post_attention_layernorm.weight"], SAME),
    (
        "decoder.layers.*.mlp.linear_fc1.weight",
        ["model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"],
        GATE_UP,
    ),
    ("decoder.layers.*.mlp.linear_fc2.weight", ["model.layers.*.mlp.down_proj.weight"], SAME),
    ("decoder.final_layernorm.weight", ["model.norm.weight"], SAME),
    ("output_layer.weight", ["lm_head.weight"], VOCABULARY),
    ("heads.*", ["heads.*"], SAME),
]

# The last row of a DualToken's codebook is padding.
CODE_VECTORS = Layout(lambda tensor, _: [], lambda parts, _: parts[0][:-1])

# The trainer's copies of the DualToken's code vectors, and where an exported model has them.
CODEBOOK_PLACES = ("embedding.codebooks", "head_codebooks")
_CODEBOOK = re.compile(rf"(?:{'|'.join(map(re.escape, CODEBOOK_PLACES))})\.(\w+)")
_HEAD = re.compile(r"heads\.(\w+)\.")
_EXPORTED_CODEBOOK = "dualtoken.quantizers.{}.codebooks.0.weight"


def codebook_of(name: str) -> str | None:
    """The exported tensor with the codebook that the trainer's tensor `name` is a copy of; None where it is none."""
    match = _CODEBOOK.fullmatch(name)
    return match and _EXPORTED_CODEBOOK.format(match[1])


def _match(pattern: str, name: str) -> tuple[str, ...] | None:
    match = re.fullmatch(re.escape(pattern).replace(r"\*", "(.+)"), name)
    return match and match.groups()


def _fill(pattern: str, texts: tuple[str, ...]) -> str:
    for text in texts:
        pattern = pattern.replace("*", text, 1)
    return pattern


def to_hf(name: str, tensor: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    """One of the trainer's full tensors under Hugging Face's names; nothing for a codebook.

    On the meta device it gives the shapes. ValueError for an unknown name.
    """
    if codebook_of(name):
        return {}
    for left, rights, layout in TABLE:
        if (texts := _match(left, name)) is not None:
            parts = layout.split(tensor, sizes)
            return {_fill(right, texts): part for right, part in zip(rights, parts, strict=True)}
    raise ValueError(f"the trainer's tensor '{name}' has no entry in the mapping table")


@dataclass(frozen=True)
class Origin:
    """The tensors of Hugging Face's that make one of the trainer's, and how."""

    names: list[str]
    layout: Layout

    def merge(self, read: Callable[[str], Tensor], sizes: Sizes) -> Tensor:
        """The trainer's tensor; `read` gives those of `names`, or their shapes on the meta device."""
        return self.layout.merge([read(name) for name in self.names], sizes)


def origins(hf_names: Iterable[str]) -> dict[str, Origin]:
    """For each of the trainer's tensors, those of an exported model that it comes from.

    The DualToken gives the codebooks of the streams that have a head; its other tensors have no place in the trainer.
    ValueError for an unknown name.
    """
    hf_names = list(hf_names)
    streams = dict.fromkeys(match[1] for name in hf_names if (match := _HEAD.match(name)))
    codebooks = {stream: Origin([_EXPORTED_CODEBOOK.format(stream)], CODE_VECTORS) for stream in streams}
    found = {f"{place}.{stream}": origin for place in CODEBOOK_PLACES for stream, origin in codebooks.items()}
    entries = {right: entry for entry in TABLE for right in entry[1]}
    for name in hf_names:
        if name.startswith("dualtoken."):
            continue
        for right, (left, rights, layout) in entries.items():
            if (texts := _match(right, name)) is not None:
                found[_fill(left, texts)] = Origin([_fill(r, texts) for r in rights], layout)
                break
        else:
            raise ValueError(f"the tensor '{name}' has no entry in the mapping table")
    return found
