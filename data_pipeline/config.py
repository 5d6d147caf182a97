"""The pre-tokenization's configuration."""

from dataclasses import asdict, dataclass, field

from omegaconf import MISSING


@dataclass
class ReadConfig:
    """Names of what is read: a tar's member suffixes, a parquet file's columns, a JSON line's fields."""

    images: list[str] = field(default_factory=lambda: ["png", "jpg", "jpeg", "webp", "image"])  # the first there is
    captions: list[str] = field(default_factory=lambda: ["txt", "caption"])  # likewise; `json:NAME` for a JSON field
    text: str = "text"  # of documents without images


@dataclass
class FilterConfig:
    """Usable samples that are left out; each reason is counted.

    An image that fails takes its caption with it; out of an interleaved document only the image is left out.
    """

    min_side: int = 16  # pixels of the shorter side
    max_aspect: float = 4.0  # longer side / shorter side
    min_caption: int = 1  # characters
    max_caption: int = 4000
    min_text: int = 1  # characters of a document that is no pair
    max_text: int = 1_000_000
    duplicates: bool = True  # leave out what repeats, image bytes and text, an earlier sample of its input shard


@dataclass
class EncodeConfig:
    """What decides the bytes of a shard beside the tokenizers."""

    batch_size: int = 64  # images at most; a batch never crosses input shards
    torch_threads: int = 1  # another number may round differently and so pick another of two near codes
    max_pixels: int = 100_000_000  # larger images are refused unread, as decompression bombs
    shard_bytes: int = 1 << 26  # of one MDS file, which a worker holds in memory while it grows


@dataclass
class WorkersConfig:
    """How the work is spread; no byte of the set depends on it, but for whether `gpus` is 0."""

    address: str | None = None  # of a Ray cluster; `local` starts one; unset takes a running one, else starts one
    count: int = 0  # workers; 0 is as many as the cluster has room for
    cpus: float = 1.0  # of one worker
    gpus: float = 0.0  # 0 encodes in fp32 on the CPU, more in bf16, which picks other codes: a set holds one kind
    decode_threads: int = 1  # of one worker, beside the encoder
    attempts: int = 3  # per input shard
    object_store_mb: int = 300  # of a Ray started here; no image passes through it
    samples_per_second: float | None = None  # of one worker, for --dry-run; unset measures it on a few samples


@dataclass
class PipelineConfig:
    inputs: list[str] = MISSING  # .tar, .parquet, .jsonl: paths, globs, brace ranges, URLs
    output: str = MISSING  # folder of the shard set, or its URL (s3://...)
    dualtoken: str = MISSING  # folder of the image tokenizer
    text_tokenizer: str = MISSING  # folder (or hub id) of the text tokenizer
    max_bad_fraction: float = 0.05  # of the samples read, and of the input shards; more failures stop the run
    read: ReadConfig = field(default_factory=ReadConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    def recipe(self) -> dict:
        """The settings that decide a shard's bytes; a set holds shards of one recipe only."""
        sections = {"read": asdict(self.read), "filters": asdict(self.filters), "encode": asdict(self.encode)}
        return {**sections, "precision": "bf16" if self.workers.gpus else "fp32"}
