"""The configuration of a DualToken tokenizer, stored as `config.json` beside its weights."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import SiglipConfig

from megadual.keys import key
from megadual.streams import Stream, check_stream_names

TIMINGS = ("per_step", "per_depth")
GOALS = ("teacher", "picture")


def siglip_config(stored: dict[str, Any]) -> SiglipConfig:
    """A SigLIP's config from its fields.

    Published ones leave special tokens of the text out. transformers then takes CLIP's, which lie outside SigLIP's
    vocabulary: it has none.
    """
    text = {"vocab_size": 32000, "bos_token_id": None, "eos_token_id": None, **(stored.get("text_config") or {})}
    for name, value in text.items():
        if name.endswith("_token_id") and isinstance(value, int) and not 0 <= value < text["vocab_size"]:
            text[name] = None
    return SiglipConfig(**{**stored, "text_config": text})


def read_siglip_config(folder: str | Path) -> SiglipConfig:
    """The config of a SigLIP in a folder or on the hub; OSError where there is none."""
    stored, _ = SiglipConfig.get_config_dict(str(folder))
    return siglip_config(stored)


@dataclass
class StreamConfig:
    """One stream of codes: which of SigLIP's layers it reads, how it is quantised, and where that goes on to.

    Layers are counted from 1, as SigLIP's hidden states are. Each is projected by itself; the sum of the projections
    is quantised. `feeds` names the goals of the quantised states: "teacher", the layers behind the deepest one that
    the stream reads, with SigLIP's image embedding at their end; "picture", the decoder; or both.
    """

    layers: list[int] = key([], "SigLIP's layers that are read, counted from 1", least=1)
    weights: list[float] = key([], "of the layers' projections in their sum; none: 1 each")
    feeds: list[str] = key([], "what the quantised states go on to: one or both", choices=GOALS)
    depth: int = key(4, "codes a position", least=1)
    codebook_size: int = key(16384, "codes that there are", least=1, most=1 << 16)
    code_dim: int = key(32, "width of their vectors, a divisor of SigLIP's", least=1)
    shared_codebook: bool = key(True, "one codebook for all depths; false: each depth has its own")
    timing: str = key("per_step", "when the codebook moves: once a step, or after each depth", choices=TIMINGS)
    decay: float = key(0.99, "of the codebook's moving averages", least=0, most=1)
    restart_unused_codes: bool = key(True, "put codes that fewer than one row a step uses elsewhere")

    @property
    def deepest(self) -> int:
        """The last layer that is read."""
        return max(self.layers)

    @property
    def layer_weights(self) -> list[float]:
        return self.weights or [1.0] * len(self.layers)

    def check(self, name: str, hidden_size: int, layers: int) -> None:
        """Raise ValueError where the stream does not fit a SigLIP of `layers` layers of width `hidden_size`."""
        if not self.layers or not all(1 <= layer <= layers for layer in self.layers):
            raise ValueError(f"stream '{name}' reads the layers {self.layers}; each must be 1 to {layers}")
        if len(self.layer_weights) != len(self.layers):
            raise ValueError(f"stream '{name}' has {len(self.weights)} weights for {len(self.layers)} layers")
        if not self.feeds or not set(self.feeds) <= set(GOALS):
            raise ValueError(f"stream '{name}' feeds {self.feeds}; give one or both of {', '.join(GOALS)}")
        if hidden_size % self.code_dim:
            raise ValueError(
                f"hidden_size({hidden_size}) is not a multiple of stream '{name}' code_dim({self.code_dim})"
            )
        if self.timing not in TIMINGS:
            raise ValueError(f"stream '{name}' timing is '{self.timing}', must be one of {TIMINGS}")


@dataclass
class DualTokenConfig:
    """Streams and sizes of a DualToken; the decoder's defaults are the released 256 px model's (paper section A1).

    Images are square. The order of the streams is that of their codes wherever they stand beside each other.
    """

    siglip: dict[str, Any] = key({}, "SiglipConfig.to_dict() of the backbone, which training fills in")
    streams: dict[str, StreamConfig] = field(default_factory=dict)
    postquant_causal: bool = key(True, "whether projections behind the codes look at earlier positions only")

    decoder_latent: int = key(16, "side of the feature map that the decoder starts from", least=1)
    decoder_in_channels: int = key(1024, "its channels", least=1)
    decoder_channels: int = key(128, "channels of the decoder's finest level", least=1)
    decoder_multipliers: list[int] = key([1, 1, 4, 4, 8], "of those, by level, the finest first", least=1)
    decoder_res_blocks: int = key(2, "residual blocks a level, beside one", least=0)
    decoder_attention: list[int] = key([16], "sides of the feature maps whose level has attention", least=1)
    decoder_norm_groups: int = key(32, "groups of the decoder's norms", least=1)

    @property
    def vision(self) -> dict[str, Any]:
        return self.siglip["vision_config"]

    @property
    def hidden_size(self) -> int:
        return self.vision["hidden_size"]

    @property
    def image_size(self) -> int:
        return self.vision["image_size"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of positions."""
        side = self.vision["image_size"] // self.vision["patch_size"]
        return side, side

    @property
    def output_size(self) -> int:
        """Side of the decoder's images; a DualToken that reconstructs what it reads has image_size here."""
        return self.decoder_latent * 2 ** (len(self.decoder_multipliers) - 1)

    @property
    def code_streams(self) -> list[Stream]:
        """What data and language models know of the streams, in order."""
        return [Stream(name, s.depth, s.codebook_size, s.code_dim) for name, s in self.streams.items()]

    def feeding(self, goal: str) -> list[str]:
        """The streams that feed one of GOALS."""
        return [name for name, stream in self.streams.items() if goal in stream.feeds]

    @property
    def deepest(self) -> int:
        """The last of SigLIP's layers that is read."""
        return max(stream.deepest for stream in self.streams.values())

    @property
    def as_reached(self) -> list[str]:
        """The streams in the order in which a pass through SigLIP has all that they read."""
        return sorted(self.streams, key=lambda name: self.streams[name].deepest)

    @property
    def teacher_layer(self) -> int | None:
        """The layer whose output quantised states replace; None where no stream feeds the teacher."""
        return max((self.streams[name].deepest for name in self.feeding("teacher")), default=None)

    @property
    def code_fields(self) -> dict[str, Any]:
        """The fields that decide what a code means, apart from the codebooks themselves."""
        sizes = ("layers", "layer_weights", "depth", "codebook_size", "code_dim", "shared_codebook")
        streams = [[name, {size: getattr(stream, size) for size in sizes}] for name, stream in self.streams.items()]
        return {"streams": streams, "image_size": self.image_size, "grid": list(self.grid)}

    def siglip_config(self) -> SiglipConfig:
        return siglip_config(self.siglip)

    def check(self) -> "DualTokenConfig":
        """Raise ValueError where streams and sizes do not fit together."""
        if not self.siglip:
            raise ValueError("DualTokenConfig.siglip is empty: it takes SiglipConfig.to_dict() of the backbone")
        if not self.streams:
            raise ValueError("DualTokenConfig.streams is empty: a DualToken has at least one stream of codes")
        check_stream_names(self.streams)
        layers = self.vision["num_hidden_layers"]
        for name, stream in self.streams.items():
            stream.check(name, self.hidden_size, layers)
        if self.teacher_layer is not None:
            for name, stream in self.streams.items():
                wrong = stream.deepest != self.teacher_layer if "teacher" in stream.feeds else (
                    stream.deepest > self.teacher_layer)  # fmt: skip
                if wrong:
                    raise ValueError(
                        f"stream '{name}' reads layer {stream.deepest}, but the layers behind layer "
                        f"{self.teacher_layer} get quantised states: streams that feed the teacher end at one layer, "
                        "the others before or at it"
                    )
        widths = [self.decoder_channels * multiplier for multiplier in self.decoder_multipliers]
        for width in (self.hidden_size, self.decoder_in_channels, *widths):
            if width % self.decoder_norm_groups:
                raise ValueError(f"width {width} is not a multiple of decoder_norm_groups({self.decoder_norm_groups})")
        return self

    def to_dict(self) -> dict[str, Any]:
        """As it is stored: the streams as a list, since JSON's writers may sort a mapping."""
        streams = [{"name": name, **dataclasses.asdict(stream)} for name, stream in self.streams.items()]
        return {**dataclasses.asdict(self), "streams": streams}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "DualTokenConfig":
        """What `to_dict` gave, checked; ValueError where fields are unknown or do not fit."""
        unknown = sorted(set(stored) - {f.name for f in dataclasses.fields(cls)})
        streams = {}
        for entry in stored.get("streams", []):
            values = dict(entry)
            name = values.pop("name", None)
            unknown += sorted(f"streams.{name}.{key}" for key in set(values) - set(StreamConfig.__dataclass_fields__))
            if not unknown:
                streams[name] = StreamConfig(**values)
        if unknown:
            raise ValueError(f"a DualToken's config has unknown fields {unknown}")
        return cls(**{**stored, "streams": streams}).check()

    def save(self, folder: str | Path) -> None:
        text = json.dumps({"model_type": "dualtoken", **self.to_dict()}, indent=2)
        (Path(folder) / "config.json").write_text(text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "DualTokenConfig":
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"no DualToken in '{folder}': it holds no config.json")
        try:
            stored = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"'{path}' is not JSON: {error}") from error
        if not isinstance(stored, dict) or stored.pop("model_type", None) != "dualtoken":
            raise ValueError(f"'{path}' is not a DualToken's: its model_type is not 'dualtoken'")
        try:
            return cls.from_dict(stored)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # of a value of another type
            raise ValueError(f"'{path}': {error}") from error
