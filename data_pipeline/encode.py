"""The worker: one input shard from its samples to a committed folder of the set."""

import resource
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.config import PipelineConfig
from data_pipeline.decode import Decoded, decode, unusable_where_broken
from data_pipeline.documents import LeftOut, RawDocument, Unusable
from data_pipeline.formats import to_document
from data_pipeline.image_root import open_image_root
from data_pipeline.images import Codes, ImageEncoder
from data_pipeline.readers import InputShard, read_samples
from data_pipeline.source import source_entry
from data_pipeline.store import open_store
from data_pipeline.writer import ShardWriter
from megadual.streams import Document, Marks
from megadual.text import load_text_tokenizer

SAMPLES_PER_IMAGE = 4  # a batch holds at most this many times batch_size samples, whatever few images they have

Outcome = Decoded | Unusable | LeftOut
Batch = list[tuple[str, Outcome]]


@dataclass
class Encoding:
    """What has been begun for a batch."""

    documents: list[Decoded]
    codes: list[Codes]
    text_ids: list[list[int]]


@dataclass
class Progress:
    """How far a worker is in its shard."""

    samples: int
    images: int
    quarantined: int
    bytes: int  # of the input shard
    memory: int  # bytes, the worker's peak


class Encoder:
    """Holds both tokenizers and encodes whole shards; a Ray actor, or used directly in one process."""

    def __init__(self, config: PipelineConfig, identity: dict):
        torch.set_num_threads(config.encode.torch_threads)
        self.config, self.identity = config, identity
        self.store = open_store(config.output)
        self.images = ImageEncoder(config.dualtoken, bool(config.workers.gpus), config.encode.batch_size)
        self.tokenizer = load_text_tokenizer(config.text_tokenizer)
        self.marks = Marks.of(self.tokenizer)
        self.threads = ThreadPoolExecutor(config.workers.decode_threads, thread_name_prefix="decode")

    def encode_shard(self, shard: InputShard) -> Iterator[Progress]:
        """Encode and commit one shard, yielding after every batch.

        A batch is written while the device computes the one behind it.
        """
        source, streams = source_entry(shard, self.config.read.image_root), self.images.config.streams
        with ShardWriter(
            self.store, source, self.identity, streams, self.marks, self.config.encode.shard_bytes
        ) as writer:
            ahead = None
            for batch, position in self.batches(shard):
                encoding = self.encode([outcome for _, outcome in batch if isinstance(outcome, Decoded)])
                if ahead:
                    yield self._write(writer, shard, *ahead)
                ahead = batch, encoding, position
            if ahead:
                yield self._write(writer, shard, *ahead)
            writer.commit()
            yield self._progress(writer, shard.size)

    def _write(
        self, writer: ShardWriter, shard: InputShard, batch: Batch, encoding: Encoding, position: int
    ) -> Progress:
        documents = iter(self.documents(encoding, shard))
        for key, outcome in batch:
            if isinstance(outcome, Unusable):
                writer.quarantine(key, str(outcome))
            elif isinstance(outcome, LeftOut):
                writer.leave_out(str(outcome))
            else:
                writer.write(next(documents), outcome.left_out_images, outcome.left_out_captions)
        return self._progress(writer, position)

    def batches(self, shard: InputShard) -> Iterator[tuple[Batch, int]]:
        """The (key, outcome) of the samples in order, in batches, each with the bytes read so far.

        A batch has at most batch_size images, unless one document alone has more.
        """
        size = self.config.encode.batch_size
        batch, images, position = [], 0, 0
        for key, outcome, read in self._decoded(shard):
            more = len(outcome.images) if isinstance(outcome, Decoded) else 0
            if batch and (images + more > size or len(batch) == SAMPLES_PER_IMAGE * size):
                yield batch, position
                batch, images = [], 0
            batch.append((key, outcome))
            images += more
            position = read
        if batch:
            yield batch, position

    def _decoded(self, shard: InputShard) -> Iterator[tuple[str, Outcome, int]]:
        """(key, outcome, bytes read) of each sample, decoded ahead by threads: two batches of images at most."""
        ahead, weight, seen = deque(), 0, set()
        images = open_image_root(self.config.read, shard.name)

        def first(outcome: Outcome | Future) -> Outcome:
            """The outcome, unless an earlier sample was the same."""
            if isinstance(outcome, Exception):
                return outcome
            digest, outcome = outcome.result()
            if digest in seen:
                return LeftOut("duplicate")
            seen.update([digest] if digest else [])
            return outcome

        for sample, position in read_samples(shard, self.config.read.max_bytes):
            try:
                document = to_document(sample, self.config.read, images)
                weighs = max(1, len(document.images))
                entry = (sample.key, self.threads.submit(self._decode, document), position, weighs)
            except (Unusable, LeftOut) as reason:
                entry = (sample.key, reason, position, 1)
            ahead.append(entry)
            weight += entry[-1]
            while weight > 2 * self.config.encode.batch_size:
                key, outcome, position, weighs = ahead.popleft()
                weight -= weighs
                yield key, first(outcome), position
        for key, outcome, position, _ in ahead:
            yield key, first(outcome), position

    def _decode(self, document: RawDocument) -> tuple[bytes | None, Outcome]:
        """(digest, outcome): with cropped pixels (h, w, 3) uint8 in the place of the images."""
        digest = None
        try:
            document.load()
            if self.config.filters.duplicates:
                digest = document.digest()
            decoded = decode(document, self.config.filters, self.config.encode, self.config.read.image_formats)
            with unusable_where_broken():
                for part in decoded.images:
                    part.image = self.images.preprocess(part.image)
        except (Unusable, LeftOut) as reason:
            return digest, reason
        return digest, decoded

    def encode(self, batch: list[Decoded]) -> Encoding:
        """Start encoding the batch's images, and tokenize its texts."""
        images = [part.image for decoded in batch for part in decoded.images]
        size = self.config.encode.batch_size
        codes = [self.images.launch(images[start : start + size]) for start in range(0, len(images), size)]
        texts = [text for decoded in batch for text in decoded.texts]
        # A text that spells a special token is still only text.
        ids = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids if texts else []
        return Encoding(batch, codes, ids)

    def documents(self, encoding: Encoding, shard: InputShard) -> list[Document]:
        """The documents of a batch: their text with `<image>` for each image, and the images' codes."""
        codes = (image for wait in encoding.codes for image in _images(wait()))
        ids = iter(encoding.text_ids)
        return [self._document(decoded, codes, ids, shard) for decoded in encoding.documents]

    def _document(self, decoded: Decoded, codes: Iterator, ids: Iterator, shard: InputShard) -> Document:
        """Takes as many of the batch's codes and text ids as the document has parts."""
        text_ids, turns = [], []
        for turn in decoded.turns:
            for part in turn.parts:
                text_ids += next(ids) if isinstance(part, str) else [self.marks.image]
            turns.append((len(text_ids), turn.role, turn.bits))
        images = [next(codes) for _ in decoded.images]
        streams = self.images.config.streams
        return Document(
            key=decoded.key,
            text_ids=np.array(text_ids, dtype=np.uint32),
            turns=np.array(turns, dtype=np.uint32),
            image_use=np.array([part.use for part in decoded.images], dtype=np.uint8),
            codes={
                name: np.concatenate([np.zeros((0, stream.depth), np.uint16), *(image[name] for image in images)])
                for name, stream in streams.items()
            },
            grids=np.array([self.images.config.grid] * len(images), dtype=np.uint16).reshape(-1, 2),
            meta={"source": shard.url, **decoded.meta},
        ).check(self.marks)

    def _progress(self, writer: ShardWriter, position: int) -> Progress:
        counts = writer.counts
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Progress(counts["samples"], counts["images"], counts["quarantined"], position, memory)


def _images(codes: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The codes of a batch, image by image."""
    for image in zip(*codes.values(), strict=True):
        yield dict(zip(codes, image, strict=True))
