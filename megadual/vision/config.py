"""The configuration of a DualToken tokenizer, stored as `config.json` beside its weights."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import SiglipConfig

STREAMS = ("semantic", "pixel")
TIMINGS = ("per_step", "per_depth")
STREAM_SIZES = ("codebook_size", "code_dim", "depth", "shared_codebook")


@dataclass
class DualTokenConfig:
    """Sizes of a DualToken; the defaults are those of the released 256 px model with depth 4 (paper section A1).

    Layers are counted from 1, as SigLIP's hidden states are. Images are square. `size` gives what may differ
    between the streams.
    """

    siglip: dict[str, Any] = field(default_factory=dict)  # SiglipConfig.to_dict() of the backbone
    layer_shortcut: int | None = 4  # None: the pixel stream reads layer_recon alone
    layer_recon: int = 6
    layer_sem: int = 26
    weight_shortcut: float = 0.6

    codebook_size: int = 16384
    code_dim: int = 32
    depth: int = 4
    shared_codebook: bool = True  # False: each depth has a codebook of its own
    # Where the pixel stream's sizes differ from the semantic one's. The language model takes equal ones only.
    pixel_codebook_size: int | None = None
    pixel_code_dim: int | None = None
    pixel_depth: int | None = None
    pixel_shared_codebook: bool | None = None
    decay: float = 0.99
    restart_unused_codes: bool = True
    timing_semantic: str = "per_step"
    timing_pixel: str = "per_depth"
    postquant_causal: bool = True

    decoder_latent: int = 16  # side of the feature map that the decoder starts from
    decoder_in_channels: int = 1024
    decoder_channels: int = 128
    decoder_multipliers: list[int] = field(default_factory=lambda: [1, 1, 4, 4, 8])  # finest level first
    decoder_res_blocks: int = 2
    decoder_attention: list[int] = field(default_factory=lambda: [16])  # resolutions with attention in their level
    decoder_norm_groups: int = 32

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

    def size(self, stream: str, name: str) -> Any:
        """One of STREAM_SIZES as it is for "semantic" or "pixel"."""
        own = getattr(self, f"pixel_{name}") if stream == "pixel" else None
        return getattr(self, name) if own is None else own

    @property
    def alike(self) -> bool:
        """Whether both streams have the same sizes and one codebook each for all depths."""
        same = all(self.size("pixel", name) == self.size("semantic", name) for name in STREAM_SIZES)
        return same and self.shared_codebook

    @property
    def code_fields(self) -> dict[str, Any]:
        """The fields that decide what a code means, apart from the codebooks themselves."""
        names = ("layer_shortcut", "layer_recon", "layer_sem", "weight_shortcut", "codebook_size", "code_dim", "depth")
        fields = {name: getattr(self, name) for name in names}
        if not self.alike:  # else left out: fingerprints of before these sizes could differ stay as they were
            fields["pixel"] = {name: self.size("pixel", name) for name in STREAM_SIZES}
            fields["shared_codebook"] = self.shared_codebook
        return fields | {"image_size": self.image_size, "grid": list(self.grid)}

    def siglip_config(self) -> SiglipConfig:
        return SiglipConfig.from_dict(self.siglip)

    def check(self) -> "DualTokenConfig":
        """Raise ValueError where the sizes do not fit together."""
        if not self.siglip:
            raise ValueError("DualTokenConfig.siglip is empty: it takes SiglipConfig.to_dict() of the backbone")
        layers = self.vision["num_hidden_layers"]
        shallow = {"layer_recon": self.layer_recon}
        if self.layer_shortcut is not None:
            shallow["layer_shortcut"] = self.layer_shortcut
        for name, layer in shallow.items():
            if not 1 <= layer <= self.layer_sem <= layers:
                raise ValueError(
                    f"1 <= {name}({layer}) <= layer_sem({self.layer_sem}) <= num_hidden_layers({layers}) does not hold"
                )
        for stream in STREAMS:
            code_dim = self.size(stream, "code_dim")
            if self.hidden_size % code_dim:
                raise ValueError(
                    f"hidden_size({self.hidden_size}) is not a multiple of the {stream} code_dim({code_dim})"
                )
        for name in ("timing_semantic", "timing_pixel"):
            if getattr(self, name) not in TIMINGS:
                raise ValueError(f"{name} is '{getattr(self, name)}', must be one of {TIMINGS}")
        widths = [self.decoder_channels * multiplier for multiplier in self.decoder_multipliers]
        for width in (self.hidden_size, self.decoder_in_channels, *widths):
            if width % self.decoder_norm_groups:
                raise ValueError(f"width {width} is not a multiple of decoder_norm_groups({self.decoder_norm_groups})")
        return self

    def save(self, folder: str | Path) -> None:
        text = json.dumps({"model_type": "dualtoken", **dataclasses.asdict(self)}, indent=2, sort_keys=True)
        (Path(folder) / "config.json").write_text(text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "DualTokenConfig":
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"no DualToken in '{folder}': it holds no config.json")
        stored = json.loads(path.read_text())
        if stored.pop("model_type", None) != "dualtoken":
            raise ValueError(f"'{path}' is not a DualToken's: its model_type is not 'dualtoken'")
        unknown = sorted(set(stored) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"'{path}' has unknown fields {unknown}")
        return cls(**stored).check()
