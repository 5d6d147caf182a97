"""The pre-tokenization's configuration."""

from dataclasses import asdict, dataclass, field

from megadual.images import FORMATS as IMAGE_FORMATS
from megadual.keys import key
from megadual.tars import SAMPLE_BYTES

FORMATS = ("auto", "conversations", "messages", "cauldron", "interleaved", "mmc4", "edit", "edit_list", "pair", "text")


@dataclass
class ReadConfig:
    """Names of what is read: a tar's member suffixes, a parquet file's columns, a JSON line's fields."""

    format: str = key(
        "auto",
        "of the samples, as docs/pre-tokenization.md lists them; auto: each as it is recognised",
        choices=FORMATS,
    )
    image_root: str | None = key(
        None,
        "where images are that are only named: a folder, a URL or a .tar; `{shard}` in it is the input file's name",
    )
    images: list[str] = key(
        ["png", "jpg", "jpeg", "webp", "image"],
        "names of an image among a tar's member suffixes or a row's columns; the first there is counts",
    )
    captions: list[str] = key(
        ["txt", "caption", "captions"], "names of its captions, likewise; `json:NAME` for a field of a tar's JSON"
    )
    text: str = key("text", "name of the text of documents without images")
    image_formats: list[str] = key(
        [*IMAGE_FORMATS], "as PIL names them; an image of any other is unusable, and its decoder never runs"
    )
    max_bytes: int = key(
        SAMPLE_BYTES,
        "of one sample (a tar's members of one key, a line or an entry of JSON) and of what a parquet file's row group "
        "may grow by when it is unpacked beyond the usual; larger ones are refused unread, as bombs",
        least=1,
    )


@dataclass
class FilterConfig:
    """Usable samples that are left out; each reason is counted.

    An image that fails takes its pair, conversation or edit with it; out of a page only the image is left out, and out
    of several captions only the one that fails.
    """

    min_side: int = key(16, "least pixels of an image's shorter side", least=0)
    max_aspect: float = key(4.0, "most of its longer side / shorter side", least=1)
    min_caption: int = key(1, "least characters of a caption", least=0)
    max_caption: int = key(4000, "most characters of a caption", least=0)
    min_text: int = key(1, "least characters of a document that is no pair", least=0)
    max_text: int = key(1_000_000, "most characters of a document that is no pair", least=0)
    duplicates: bool = key(True, "leave out what repeats, image bytes and text, an earlier sample of its input shard")


@dataclass
class EncodeConfig:
    """What decides the bytes of a shard beside the tokenizers."""

    batch_size: int = key(64, "images at most; a batch never crosses input shards", least=1)
    torch_threads: int = key(
        1, "of the encoder; other numbers may round differently, and so pick the other of two near codes", least=1
    )
    max_pixels: int = key(100_000_000, "larger images are refused unread, as decompression bombs", least=1)
    shard_bytes: int = key(1 << 26, "of one MDS file, which a worker holds in memory while it grows", least=1)


@dataclass
class WorkersConfig:
    """How the work is spread; no byte of the set depends on it, but for whether `gpus` is 0."""

    address: str | None = key(None, "of a Ray cluster; `local` starts one; null takes a running one, else starts one")
    count: int = key(0, "workers; 0 is as many as the cluster has room for", least=0)
    cpus: float = key(1.0, "CPU cores of one worker", over=0)
    gpus: float = key(
        0.0,
        "GPUs of one worker; 0 encodes in fp32 on the CPU, more in bf16, which picks other codes: a set holds one kind",
        least=0,
    )
    decode_threads: int = key(1, "threads of one worker that decode, beside the encoder", least=1)
    attempts: int = key(3, "tries per input shard", least=1)
    object_store_mb: int = key(300, "MB of the object store of a Ray started here; no image passes through it", least=1)
    samples_per_second: float | None = key(
        None, "of one worker, for --dry-run; null measures it on a few samples", over=0
    )


@dataclass
class PipelineConfig:
    inputs: list[str] = key(about=".tar, .parquet, .json, .jsonl: paths, globs, brace ranges, URLs")
    output: str = key(about="folder of the shard set, or its URL (s3://...)")
    dualtoken: str = key(about="folder of the image tokenizer")
    text_tokenizer: str = key(about="folder (or hub id) of the text tokenizer")
    max_bad_fraction: float = key(
        0.05, "of the samples read, and of the input shards; more failures stop the run", least=0, most=1
    )
    changed: str = key(
        "refuse",
        "inputs that are not as they were when they were read: refuse stops and names them, redo reads them again, "
        "keep leaves what was made of them",
        choices=("refuse", "redo", "keep"),
    )
    read: ReadConfig = field(default_factory=ReadConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    def recipe(self) -> dict:
        """The settings that decide a shard's bytes; a set holds shards of one recipe only."""
        read = asdict(self.read)
        del read["image_root"]  # a place, as `inputs` are
        del read["max_bytes"]  # of the machine: may be raised for one input that needs it
        sections = {"read": read, "filters": asdict(self.filters), "encode": asdict(self.encode)}
        return {**sections, "precision": "bf16" if self.workers.gpus else "fp32"}
