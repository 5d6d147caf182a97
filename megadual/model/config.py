"""The model's keys, and named shapes that fill them.

The Qwen2.5 shapes (3b, 7b, 14b, 32b) take the sizes of the released base models; heads are the paper's.
"""

import dataclasses

from megadual.errors import UserError
from megadual.keys import key

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
    "14b": dict(
        layers=48, hidden=5120, ffn=13824, heads=40, kv_heads=8, rope_base=1e6, norm_eps=1e-5, tie_embeddings=False,
        head=_PAPER_HEAD,
    ),
    "32b": dict(
        layers=64, hidden=5120, ffn=27648, heads=40, kv_heads=8, rope_base=1e6, norm_eps=1e-5, tie_embeddings=False,
        head=_PAPER_HEAD,
    ),
}  # fmt: skip


@dataclasses.dataclass
class HeadConfig:
    """Each stream's visual head (DepthHead)."""

    width: int | None = key(
        None, "width of the depth transformer; null: the preset's, as all that is null here", least=1
    )
    layers: int | None = key(None, "its layers", least=1)
    heads: int | None = key(None, "its attention heads", least=1)
    ffn: int | None = key(None, "width of its feed-forward layers", least=1)


@dataclasses.dataclass
class ModelConfig:
    """A Qwen2.5-shaped decoder with a visual projector and a visual head for each stream."""

    preset: str = key("tiny", "the shape that fills every key of the model that is null", choices=tuple(PRESETS))
    layers: int | None = key(None, "layers of the decoder", least=1)
    hidden: int | None = key(None, "its width", least=1)
    ffn: int | None = key(None, "width of its feed-forward layers", least=1)
    heads: int | None = key(None, "attention heads", least=1)
    kv_heads: int | None = key(None, "heads of keys and values, each shared by heads / kv_heads", least=1)
    rope_base: float | None = key(None, "base of the rotary positions", over=0)
    norm_eps: float | None = key(None, "epsilon of the RMS norms", over=0)
    tie_embeddings: bool | None = key(None, "whether text is written with the table that it is read with")
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    dualtoken: str = key(about="folder of the DualToken whose codes the model reads and writes")
    streams: list[str] | None = key(None, "those of its streams that the model has; null: all")
    text_tokenizer: str = key(about="Hugging Face folder or id")

    def resolve(self) -> None:
        """Fill every null field that the preset has; UserError where the sizes do not fit together."""
        _fill(self, PRESETS[self.preset])
        for heads, width, name in (
            (self.heads, self.hidden, "model"),
            (self.head.heads, self.head.width, "model.head"),
        ):
            assert heads and width  # every preset has them
            if width % heads:
                raise UserError(f"{name}: width {width} is not divisible by heads {heads}")
        assert self.hidden and self.heads and self.kv_heads
        if self.hidden // self.heads % 2:
            raise UserError(
                f"model.hidden({self.hidden}) / model.heads({self.heads}) = {self.hidden // self.heads} must be even: "
                "rotary positions turn pairs of numbers"
            )
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads {self.heads} is not divisible by model.kv_heads {self.kv_heads}")


def _fill(section, preset: dict) -> None:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _fill(value, preset[field.name])
        elif value is None and field.name in preset:
            setattr(section, field.name, preset[field.name])
