"""The worker: one input shard from its samples to a committed folder of the set.

Shape suffixes: B images of a batch, N positions of an image, D code depth.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.config import PipelineConfig
from data_pipeline.decode import LeftOut, Pair, Unusable, decode
from data_pipeline.readers import InputShard, RawSample, read_samples
from data_pipeline.writer import ShardWriter
from megadual.streams import Document, SpecialIds
from megadual.text import load_text_tokenizer
from megadual.vision import DualToken


@dataclass
class Progress:
    """How far a worker is in its shard."""

    samples: int
    quarantined: int
    bytes: int  # of the input shard


class Encoder:
    """Holds both tokenizers and encodes whole shards; a Ray actor, or used directly in one process."""

    def __init__(self, config: PipelineConfig, identity: dict):
        torch.set_num_threads(config.encode.torch_threads)
        self.config, self.identity = config, identity
        self.device = torch.device("cuda" if config.workers.gpus else "cpu")
        self.dualtoken = DualToken.from_pretrained(config.dualtoken).to(self.device).eval()
        self.tokenizer = load_text_tokenizer(config.text_tokenizer)
        self.special = SpecialIds.of(self.tokenizer)
        self.threads = ThreadPoolExecutor(config.workers.decode_threads, thread_name_prefix="decode")

    def encode_shard(self, shard: InputShard) -> Iterator[Progress]:
        """Encode and commit one shard, yielding after every batch."""
        batch_size = self.config.encode.batch_size
        outcomes, pairs = [], 0  # of samples since the last batch, in order
        with ShardWriter(Path(self.config.output), shard, self.identity, self.config.encode.shard_bytes) as writer:
            for outcome, position in self._decoded(shard):
                outcomes.append(outcome)
                pairs += isinstance(outcome[1], tuple)
                if pairs == batch_size:
                    self._write(outcomes, shard, writer)
                    outcomes, pairs = [], 0
                    yield Progress(writer.counts["samples"], writer.counts["quarantined"], position)
            self._write(outcomes, shard, writer)
            writer.commit()
            yield Progress(writer.counts["samples"], writer.counts["quarantined"], shard.size)

    def _decoded(self, shard: InputShard) -> Iterator[tuple[tuple, int]]:
        """(key, outcome) of each sample and the bytes read, decoded ahead by threads but at most two batches."""
        ahead = deque()
        for sample, position in read_samples(shard):
            ahead.append((self.threads.submit(self._decode, sample), position))
            if len(ahead) > 2 * self.config.encode.batch_size:
                future, position = ahead.popleft()
                yield future.result(), position
        for future, position in ahead:
            yield future.result(), position

    def _decode(self, sample: RawSample) -> tuple[str, tuple[Pair, torch.Tensor] | Unusable | LeftOut]:
        try:
            pair = decode(sample, self.config.read, self.config.filters, self.config.encode)
        except (Unusable, LeftOut) as reason:
            return sample.key, reason
        pixels = self.dualtoken.preprocess(pair.image)
        pair.image = None  # two batches of them are waiting
        return sample.key, (pair, pixels)

    def _write(self, outcomes: list[tuple], shard: InputShard, writer: ShardWriter) -> None:
        documents = iter(self._encode([outcome for _, outcome in outcomes if isinstance(outcome, tuple)], shard))
        for key, outcome in outcomes:
            if isinstance(outcome, Unusable):
                writer.quarantine(key, str(outcome))
            elif isinstance(outcome, LeftOut):
                writer.leave_out(str(outcome))
            else:
                writer.write(next(documents))

    @torch.inference_mode()
    def _encode(self, batch: list[tuple[Pair, torch.Tensor]], shard: InputShard) -> list[Document]:
        """The documents of up to a batch of pairs: `<image>` and the caption, with the image's codes."""
        if not batch:
            return []
        codes = self.dualtoken.encode(torch.stack([pixels for _, pixels in batch]).to(self.device))
        rows, columns = codes.semantic.shape[1:3]
        semantic_BND = codes.semantic.flatten(1, 2).cpu().numpy().astype(np.uint16)
        pixel_BND = codes.pixel.flatten(1, 2).cpu().numpy().astype(np.uint16)
        # A caption that spells a special token is still only text.
        captions = self.tokenizer(
            [pair.caption for pair, _ in batch], add_special_tokens=False, split_special_tokens=True
        ).input_ids
        return [
            Document(
                key=pair.key,
                text_ids=np.array([self.special.image, *ids], dtype=np.uint32),
                semantic=semantic,
                pixel=pixel,
                grids=np.array([[rows, columns]], dtype=np.uint16),
                meta={"source": shard.url, **pair.meta},
            ).check(self.special)
            for (pair, _), ids, semantic, pixel in zip(batch, captions, semantic_BND, pixel_BND, strict=True)
        ]
