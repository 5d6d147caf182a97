"""Named model shapes. The Qwen2.5 ones take the sizes of the released models; heads are the paper's."""

import dataclasses

from megadual.config import ModelConfig
from megadual.errors import UserError

_PAPER_HEAD = dict(width=2048, layers=3, heads=16, ffn=5504)

PRESETS = {
    "tiny": dict(
        layers=4, hidden=128, ffn=384, heads=4, kv_heads=2, rope_base=10000.0, norm_eps=1e-6, tie_embeddings=False,
        head=dict(width=96, layers=3, heads=4, ffn=256),
    ),
    "3b": dict(
        layers=36, hidden=2048, ffn=11008, heads=16, kv_heads=2, rope_base=1e6, norm_eps=1e-6, tie_embeddings=True,
        head=_PAPER_HEAD,
    ),
    "7b": dict(
        layers=28, hidden=3584, ffn=18944, heads=28, kv_heads=4, rope_base=1e6, norm_eps=1e-6, tie_embeddings=False,
        head=_PAPER_HEAD,
    ),
}  # fmt: skip


def resolve(model: ModelConfig) -> ModelConfig:
    """`model` with every null field filled that its preset has."""
    if model.preset not in PRESETS:
        raise UserError(f"model.preset '{model.preset}' is unknown; known: {', '.join(PRESETS)}")

    def fill(section, preset):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                fill(value, preset[field.name])
            elif value is None and field.name in preset:
                setattr(section, field.name, preset[field.name])
        return section

    model = fill(dataclasses.replace(model, head=dataclasses.replace(model.head)), PRESETS[model.preset])
    for heads, name in ((model.heads, "model"), (model.head.heads, "model.head")):
        width = model.hidden if name == "model" else model.head.width
        if width % heads:
            raise UserError(f"{name}: width {width} is not divisible by heads {heads}")
    if model.heads % model.kv_heads:
        raise UserError(f"model.heads {model.heads} is not divisible by model.kv_heads {model.kv_heads}")
    return model
