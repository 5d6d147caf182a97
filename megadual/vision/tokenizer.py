"""DualToken: one SigLIP, two code streams. Shallow layers give pixel codes, the deep layer semantic ones.

Shape suffixes: B batch, N positions (= rows * columns), E SigLIP width, C code width, D code depth,
K codebook size, P pooled width. State-dict names follow the published weights' layout.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipModel

from .config import STREAMS, DualTokenConfig
from .decoder import Decoder, ResnetBlock
from .projection import AttnProjection
from .quantizer import ResidualQuantizer

QUANTIZERS = {"semantic": "quantizer_sem", "pixel": "quantizer_pix"}
UPRIGHT = {  # what EXIF's orientations take to be upright; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass
class Encoded:
    """Codes (B, rows, columns, D) int64 of both streams, and the quantised path's image embedding (B, P)."""

    semantic: Tensor
    pixel: Tensor
    pooled: Tensor | None  # None where it was not asked for


@dataclass
class DualTokenOutput:
    """What training needs: zq_sem (B, N, E) enters the last layers, codes are (B, N, D)."""

    zq_sem: Tensor
    pooled: Tensor
    reconstruction: Tensor
    semantic: Tensor
    pixel: Tensor
    commit_sem: Tensor
    commit_pix: Tensor


def hidden_states(vision_model, images: Tensor, until: int) -> list[Tensor]:
    """[embeddings, layer 1, ..., layer `until`] of a SigLIP vision model, each (B, N, E)."""
    states = [vision_model.embeddings(images)]
    for layer in vision_model.encoder.layers[:until]:
        states.append(layer(states[-1], None))
    return states


def finish(vision_model, x_BNE: Tensor, after: int) -> Tensor:
    """Run the layers behind layer `after`, the last norm and the attention-pool head: pooled (B, P)."""
    for layer in vision_model.encoder.layers[after:]:
        x_BNE = layer(x_BNE, None)
    return vision_model.head(vision_model.post_layernorm(x_BNE))


def check_images(images: Tensor, config: DualTokenConfig) -> None:
    size = config.image_size
    if images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise ValueError(f"images of shape {tuple(images.shape)}, this DualToken takes (B, 3, {size}, {size})")


def check_pixel_codes(codes: Tensor, config: DualTokenConfig) -> None:
    expected = (*config.grid, config.size("pixel", "depth"))
    if codes.ndim != 4 or codes.shape[1:] != expected:
        raise ValueError(f"pixel codes of shape {tuple(codes.shape)}, expected (B, {expected})")


class DualToken(nn.Module):
    """The image tokenizer (paper section A1). Images are (B, 3, h, w) in [-1, 1], h = w = config.image_size."""

    def __init__(self, config: DualTokenConfig, siglip_model: SiglipModel | None = None):
        """Raises ValueError where the config's sizes do not fit. Without `siglip_model` its weights are random."""
        super().__init__()
        self.config = config.check()
        hidden = config.hidden_size
        sem_dim, pix_dim = (config.size(stream, "code_dim") for stream in STREAMS)
        self.siglip_model = siglip_model if siglip_model is not None else SiglipModel(config.siglip_config())
        self.prequant_sem = AttnProjection(hidden, sem_dim)
        self.prequant_pix = AttnProjection(hidden, pix_dim)
        self.prequant_shortcut = None if config.layer_shortcut is None else AttnProjection(hidden, pix_dim)
        for stream, name in QUANTIZERS.items():
            quantizer = ResidualQuantizer(
                config.size(stream, "codebook_size"),
                config.size(stream, "code_dim"),
                config.size(stream, "depth"),
                config.decay,
                config.restart_unused_codes,
                getattr(config, f"timing_{stream}"),
                config.size(stream, "shared_codebook"),
            )
            self.add_module(name, quantizer)
        self.postquant_sem = AttnProjection(sem_dim, hidden, causal=config.postquant_causal)
        self.postquant_pix = AttnProjection(pix_dim, hidden, causal=config.postquant_causal)
        groups = config.decoder_norm_groups
        self.post_quant_conv = ResnetBlock(hidden, config.decoder_in_channels, groups, first_kernel=1)
        self.decoder = Decoder(
            config.decoder_latent,
            config.decoder_in_channels,
            config.decoder_channels,
            config.decoder_multipliers,
            config.decoder_res_blocks,
            config.decoder_attention,
            groups,
        )
        self.siglip_model.requires_grad_(False)
        self.siglip_model.vision_model.requires_grad_(True)  # the text tower is never trained

    def quantizer(self, stream: str) -> ResidualQuantizer:
        return getattr(self, QUANTIZERS[stream])

    def codebook(self, stream: str) -> Tensor:
        """The code vectors (K, C) of "semantic" or "pixel"; (D, K, C) where each depth has its own codebook."""
        return self.quantizer(stream).codes

    def forward(self, images: Tensor, reconstruct: bool = True, pooled: bool = True) -> DualTokenOutput:
        """Both paths, straight-through; what is not to be computed, reconstruction or pooled, is None."""
        vision, config = self.siglip_model.vision_model, self.config
        states = hidden_states(vision, images, config.layer_sem)
        x_pix_BNC = self.prequant_pix(states[config.layer_recon])
        if self.prequant_shortcut is not None:
            x_pix_BNC = x_pix_BNC + config.weight_shortcut * self.prequant_shortcut(states[config.layer_shortcut])
        pix_BNC, pixel_BND, commit_pix = self.quantizer_pix(x_pix_BNC)
        sem_BNC, semantic_BND, commit_sem = self.quantizer_sem(self.prequant_sem(states[config.layer_sem]))
        zq_sem_BNE = self.postquant_sem(sem_BNC)
        return DualTokenOutput(
            zq_sem=zq_sem_BNE,
            pooled=finish(vision, zq_sem_BNE, config.layer_sem) if pooled else None,
            reconstruction=self._decode(pix_BNC) if reconstruct else None,
            semantic=semantic_BND,
            pixel=pixel_BND,
            commit_sem=commit_sem,
            commit_pix=commit_pix,
        )

    def _decode(self, x_BNC: Tensor) -> Tensor:
        x = self.postquant_pix(x_BNC).transpose(1, 2).unflatten(2, self.config.grid)
        latent = (self.config.decoder_latent,) * 2
        if x.shape[2:] != latent:
            x = F.interpolate(x, size=latent, mode="bilinear")
        return self.decoder(self.post_quant_conv(x))

    @torch.no_grad()
    def encode(self, images: Tensor, pooled: bool = True) -> Encoded:
        """Codes and pooled embedding of images (B, 3, h, w) in [-1, 1]; ValueError for another size.

        `pooled=False` spares the layers behind the semantic codes, where only codes are wanted.
        """
        check_images(images, self.config)
        output = self(images, reconstruct=False, pooled=pooled)
        semantic, pixel = (codes.unflatten(1, self.config.grid) for codes in (output.semantic, output.pixel))
        return Encoded(semantic, pixel, output.pooled)

    @torch.no_grad()
    def decode(self, pixel_codes: Tensor) -> Tensor:
        """Pixel codes (B, rows, columns, D) -> images (B, 3, h, w), clamped to [-1, 1]; ValueError for other codes."""
        check_pixel_codes(pixel_codes, self.config)
        return self._decode(self.embed(pixel_codes, "pixel").flatten(1, 2)).clamp(-1, 1)

    def embed(self, codes: Tensor, stream: str) -> Tensor:
        """Sum over depths of a stream's code vectors: (..., D) ints -> (..., C)."""
        return self.quantizer(stream).embed(codes)

    def preprocess(self, image: Image.Image) -> Tensor:
        """A PIL image -> (3, h, w) in [-1, 1]: shortest side resized (bicubic), centre crop (paper section A5)."""
        return to_tensor(centre_crop(image, self.config.image_size))

    def fingerprint(self) -> str:
        """sha256 of both codebooks and of the fields that define codes: equal for interchangeable codes."""
        return fingerprint(self.config, {stream: self.codebook(stream) for stream in STREAMS})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save(folder)
        save_model(self, str(folder / "model.safetensors"))

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "DualToken":
        """Read what save_pretrained wrote, in eval mode on `device`; ValueError where something is missing."""
        with torch.device("meta"):  # weights that are about to be read need no random numbers
            model = cls(DualTokenConfig.load(folder))
        model.to_empty(device=device)
        for name, buffer in model.named_buffers():  # those that are not saved
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
            elif name.endswith("restarted"):
                buffer.zero_()
        model.load_weights(folder)
        return model.eval()

    def load_weights(self, folder: str | Path) -> None:
        """Take the weights that save_pretrained wrote; RuntimeError where they do not fit."""
        load_model(self, str(_weights_file(folder)), device=str(next(self.parameters()).device))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as it is meant to be seen: upright, transparency on white, 16 bits scaled to 8; again: no change.

    Raises what PIL does on a broken image.
    """
    image.load()  # first, so that its errors are not taken for EXIF's
    turn = _turn(image)
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip at 255
        grey = np.asarray(image)
        light = np.where(grey == image.info.get("transparency"), 255, (grey >> 8).clip(0, 255))
        image = Image.fromarray(light.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # its EXIF would turn it once more
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright; one with broken EXIF is taken to be."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # of PIL's reader: whatever unpacking wrong bytes leads to
        return None


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Any image in RGB, its shortest side at `size` (bicubic), then the central square."""
    image = to_rgb(image)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image -> (3, h, w) in [-1, 1]."""
    return normalise_pixels(torch.from_numpy(np.array(image)))


def normalise_pixels(x: Tensor) -> Tensor:
    """uint8 (..., h, w, 3) -> (..., 3, h, w) in [-1, 1], SigLIP's normalisation."""
    return x.movedim(-1, -3).float() / 127.5 - 1


def to_image(x: Tensor) -> Image.Image:
    """(3, h, w) in [-1, 1] -> an RGB image."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def fingerprint(config: DualTokenConfig, codebooks: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(config.code_fields, sort_keys=True).encode())
    for stream in STREAMS:
        digest.update(codebooks[stream].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _weights_file(folder: str | Path) -> Path:
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"no DualToken in '{folder}': it holds no model.safetensors")
    return path


def read_codebooks(folder: str | Path) -> dict:
    """A saved DualToken's codebooks without building the model.

    Returns {"semantic": (K, C) fp32, "pixel": (K, C) fp32, "fingerprint": str, "depth": int, "grid": (r, c)};
    ValueError where the streams' sizes differ or each depth has a codebook of its own.
    """
    config = DualTokenConfig.load(folder)
    if not config.alike:
        raise ValueError(
            f"'{folder}': data and language models take streams of equal sizes, one codebook for all depths"
        )
    with safe_open(str(_weights_file(folder)), framework="pt") as weights:
        codebooks = {
            stream: weights.get_tensor(f"{name}.codebooks.0.weight")[:-1].float() for stream, name in QUANTIZERS.items()
        }
    return {
        **codebooks,
        "fingerprint": fingerprint(config, codebooks),
        "depth": config.depth,
        "grid": config.grid,
    }
