"""The configuration of a DualToken tokenizer, stored as `config.json` beside its weights."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import SiglipConfig

STREAMS = ("semantic", "pixel")
TIMINGS = ("per_step", "per_depth")


@dataclass
class DualTokenConfig:
    """Sizes of a DualToken; the defaults are those of the released 256 px model with depth 4 (paper section A1).

    Layers are counted from 1, as SigLIP's hidden states are. Images are square.
    """

    siglip: dict[str, Any] = field(default_factory=dict)  # SiglipConfig.to_dict() of the backbone
    layer_shortcut: int = 4
    layer_recon: int = 6
    layer_sem: int = 26
    weight_shortcut: float = 0.6

    codebook_size: int = 16384
    code_dim: int = 32
    depth: int = 4
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
    def code_fields(self) -> dict[str, Any]:
        """The fields that decide what a code means, apart from the codebooks themselves."""
        names = ("layer_shortcut", "layer_recon", "layer_sem", "weight_shortcut", "codebook_size", "code_dim", "depth")
        return {name: getattr(self, name) for name in names} | {"image_size": self.image_size, "grid": list(self.grid)}

    def siglip_config(self) -> SiglipConfig:
        return SiglipConfig.from_dict(self.siglip)

    def check(self) -> "DualTokenConfig":
        """Raise ValueError where the sizes do not fit together."""
        if not self.siglip:
            raise ValueError("DualTokenConfig.siglip is empty: it takes SiglipConfig.to_dict() of the backbone")
        layers = self.vision["num_hidden_layers"]
        if not 1 <= self.layer_shortcut <= self.layer_recon <= self.layer_sem < layers:
            raise ValueError(
                f"1 <= layer_shortcut({self.layer_shortcut}) <= layer_recon({self.layer_recon}) <= "
                f"layer_sem({self.layer_sem}) < num_hidden_layers({layers}) does not hold"
            )
        if self.hidden_size % self.code_dim:
            raise ValueError(f"hidden_size({self.hidden_size}) is not a multiple of code_dim({self.code_dim})")
        for name in ("timing_semantic", "timing_pixel"):
            if getattr(self, name) not in TIMINGS:
                raise ValueError(f"{name} is '{getattr(self, name)}', must be one of {TIMINGS}")
        upsampled = self.decoder_latent * 2 ** (len(self.decoder_multipliers) - 1)
        if upsampled != self.image_size:
            raise ValueError(
                f"decoder_latent({self.decoder_latent}) * 2^(levels({len(self.decoder_multipliers)}) - 1) = {upsampled}"
                f" != image_size({self.image_size})"
            )
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
