"""Configuration of an exported MegaDual model."""

from transformers import PretrainedConfig, Qwen2Config

from megadual.streams import SpecialIds, Stream
from megadual.vision.config import DualTokenConfig


class MegaDualConfig(PretrainedConfig):
    """A Qwen2 decoder with a visual projector, two depth heads and a DualToken.

    text_config is a Qwen2Config or its fields; `rope_base` stands here too, because transformers 4 and 5 name
    it differently there. `streams` are those of the DualToken's that the model reads and writes; None: all. `head` are
    the sizes of each stream's visual head: width, layers, heads, ffn. `dualtoken` is DualTokenConfig.to_dict(),
    `special_ids` are the fields of streams.SpecialIds.
    """

    model_type = "megadual"
    sub_configs = {"text_config": Qwen2Config}

    def __init__(
        self, text_config=None, rope_base=1e6, streams=None, head=None, dualtoken=None, special_ids=None, **kwargs
    ):
        if not isinstance(text_config, Qwen2Config):
            text_config = Qwen2Config(**{**(text_config or {}), "rope_theta": rope_base})
        self.text_config = text_config
        self.rope_base = rope_base
        self.streams = streams
        self.head = head or {}
        self.dualtoken = dualtoken or {}
        self.special_ids = special_ids or {}
        kwargs["tie_word_embeddings"] = text_config.tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def special(self) -> SpecialIds:
        return SpecialIds(**self.special_ids)

    def dualtoken_config(self) -> DualTokenConfig:
        return DualTokenConfig.from_dict(self.dualtoken)

    @property
    def code_streams(self) -> list[Stream]:
        """The streams that the model reads and writes, in order."""
        return [s for s in self.dualtoken_config().code_streams if self.streams is None or s.name in self.streams]
