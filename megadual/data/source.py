"""A shard set together with how it is to be read."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from megadual.data.mds_reader import ShardSet
from megadual.train.config import SetConfig


@dataclass(frozen=True)
class Source:
    documents: ShardSet
    config: SetConfig
    prompts: list[tuple[int, ...]] = field(default_factory=list)  # config.prompts, each as the text ids behind an image

    @classmethod
    def open(cls, config: SetConfig, tokenizer, streams: Iterable[str] | None = None) -> "Source":
        """With the codes of `streams`, None for all; UserError where the set can't be read."""
        texts = [prompt.strip() for prompt in config.prompts]  # as in a conversation
        # A text that spells a special token is still only text.
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids if texts else []
        return cls(ShardSet(config.path, streams, meta=False), config, [tuple(each) for each in ids])
