"""A shard set together with how it is to be read."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from megadual.data.cache import Cache
from megadual.data.mds_reader import ShardSet
from megadual.streams import Stream
from megadual.train.config import SetConfig


@dataclass(frozen=True)
class Source:
    documents: ShardSet
    config: SetConfig
    prompts: list[tuple[int, ...]] = field(default_factory=list)  # config.prompts, each as the text ids behind an image
    streams: list[Stream] = field(default_factory=list)  # the model's; none: codes are not compared with them
    text_size: int | None = None  # the model's text tokens, likewise

    @classmethod
    def open(
        cls, config: SetConfig, tokenizer, streams: Iterable[Stream] | None = None, cache: Cache | None = None
    ) -> "Source":
        """With the codes of `streams`, None for all; a set at a URL comes into `cache`. UserError where it can't."""
        texts = [prompt.strip() for prompt in config.prompts]  # as in a conversation
        # A text that spells a special token is still only text.
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids if texts else []
        chosen = None if streams is None else list(streams)
        names = None if chosen is None else [stream.name for stream in chosen]
        documents = ShardSet(config.path, names, meta=False, cache=cache)
        size = None if tokenizer is None else len(tokenizer)
        return cls(documents, config, [tuple(each) for each in ids], chosen or [], size)
