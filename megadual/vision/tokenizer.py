"""DualToken: one SigLIP, several streams of codes, each from layers of its own and for goals of its own.

In the paper two: pixel codes from shallow layers for the picture decoder, semantic ones from a deep layer for the
layers behind it. Shape suffixes: B batch, N positions (= rows * columns), E SigLIP width, C code width, D code depth,
K codebook size, P pooled width; C, D and K are a stream's own.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipModel

from megadual.streams import Stream

from .config import DualTokenConfig
from .decoder import Decoder, ResnetBlock
from .projection import AttnProjection
from .quantizer import ResidualQuantizer

UPRIGHT = {  # what EXIF's orientations take to be upright; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


MAX_ASPECT = 64  # of images that are resized as they are


@dataclass
class Encoded:
    """Codes (B, rows, columns, D) int64 by stream, and the image embedding (B, P) of the quantised path."""

    codes: dict[str, Tensor]
    pooled: Tensor | None  # None where it was not asked for, or no stream feeds the teacher

    def __repr__(self) -> str:
        """Shapes, not values."""
        shapes = [f"{name} {tuple(codes.shape)}" for name, codes in self.codes.items()]
        return f"Encoded({', '.join(shapes + ([] if self.pooled is None else [f'pooled {tuple(self.pooled.shape)}']))})"


@dataclass
class DualTokenOutput:
    """What training needs: by stream codes (B, N, D) and the commitment loss; `features` (B, N, E) enter the layers
    behind the teacher's. None is what was not to be computed, or no stream feeds.
    """

    codes: dict[str, Tensor]
    commitments: dict[str, Tensor]
    features: Tensor | None
    pooled: Tensor | None
    reconstruction: Tensor | None


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


def check_picture_codes(codes: dict[str, Tensor], config: DualTokenConfig) -> None:
    """ValueError where the streams that feed the picture are not all there, or have another shape."""
    needed = config.feeding("picture")
    if not needed:
        raise ValueError("no stream of this DualToken feeds a picture decoder: it draws nothing")
    if missing := [name for name in needed if name not in codes]:
        raise ValueError(f"pictures are decoded from {', '.join(needed)} codes; {', '.join(missing)} are missing")
    for name in needed:
        expected = (*config.grid, config.streams[name].depth)
        if codes[name].ndim != 4 or codes[name].shape[1:] != expected:
            raise ValueError(f"{name} codes of shape {tuple(codes[name].shape)}, expected (B, {expected})")
        if codes[name].is_floating_point():
            raise ValueError(f"{name} codes are {codes[name].dtype}, expected integers")


class DualToken(nn.Module):
    """The image tokenizer (paper section A1). Images are (B, 3, h, w) in [-1, 1], h = w = config.image_size."""

    def __init__(self, config: DualTokenConfig, siglip_model: SiglipModel | None = None):
        """Raises ValueError where the config's sizes do not fit. Without `siglip_model` its weights are random."""
        super().__init__()
        self.config = config.check()
        hidden, streams = config.hidden_size, config.streams
        self.siglip_model = siglip_model if siglip_model is not None else SiglipModel(config.siglip_config())
        self.prequant = nn.ModuleDict(
            {name: nn.ModuleList(AttnProjection(hidden, s.code_dim) for _ in s.layers) for name, s in streams.items()}
        )
        self.quantizers = nn.ModuleDict(
            {
                name: ResidualQuantizer(
                    s.codebook_size, s.code_dim, s.depth, s.decay, s.restart_unused_codes, s.timing, s.shared_codebook
                )
                for name, s in streams.items()
            }
        )
        self.postquant = nn.ModuleDict(  # stream -> goal
            {
                name: nn.ModuleDict(
                    {goal: AttnProjection(s.code_dim, hidden, causal=config.postquant_causal) for goal in s.feeds}
                )
                for name, s in streams.items()
            }
        )
        self.post_quant_conv = self.decoder = None
        if config.feeding("picture"):
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
        self._train_what_is_used()

    def _train_what_is_used(self) -> None:
        """The text tower rests; so does what lies behind the codes where no stream feeds the teacher."""
        self.siglip_model.requires_grad_(False)
        vision = self.siglip_model.vision_model
        vision.requires_grad_(True)
        if self.config.teacher_layer is None:
            for module in (vision.encoder.layers[self.config.deepest :], vision.post_layernorm, vision.head):
                module.requires_grad_(False)

    def codebook(self, stream: str) -> Tensor:
        """The code vectors (K, C) of a stream; (D, K, C) where each depth has its own codebook."""
        return self.quantizers[stream].codes

    def forward(self, images: Tensor, reconstruct: bool = True, pooled: bool = True) -> DualTokenOutput:
        """All streams, straight-through; what is not to be computed, reconstruction or pooled, is None."""
        vision, config = self.siglip_model.vision_model, self.config
        states = hidden_states(vision, images, config.deepest)
        quantized, codes, commitments = {}, {}, {}
        for name in config.as_reached:
            quantized[name], codes[name], commitments[name] = self.quantizers[name](self.read(name, states))
        features = self._feed("teacher", quantized)
        return DualTokenOutput(
            codes={name: codes[name] for name in config.streams},
            commitments={name: commitments[name] for name in config.streams},
            features=features,
            pooled=finish(vision, features, config.teacher_layer) if pooled and features is not None else None,
            reconstruction=self._decode(quantized) if reconstruct and self.decoder is not None else None,
        )

    def read(self, name: str, states: list[Tensor]) -> Tensor:
        """What a stream quantises, (B, N, C): the weighted sum of its layers' projections."""
        stream, total = self.config.streams[name], None
        for layer, weight, project in zip(stream.layers, stream.layer_weights, self.prequant[name], strict=True):
            x_BNC = project(states[layer])
            x_BNC = x_BNC if weight == 1 else weight * x_BNC
            total = x_BNC if total is None else total + x_BNC
        return total

    def _feed(self, goal: str, quantized: dict[str, Tensor]) -> Tensor | None:
        """(B, N, E), the sum of what the streams give a goal; None where no stream does."""
        given = [self.postquant[name][goal](quantized[name]) for name in self.config.feeding(goal)]
        return sum(given[1:], start=given[0]) if given else None

    def _decode(self, quantized: dict[str, Tensor]) -> Tensor:
        x = self._feed("picture", quantized).transpose(1, 2).unflatten(2, self.config.grid)
        latent = (self.config.decoder_latent,) * 2
        if x.shape[2:] != latent:
            x = F.interpolate(x, size=latent, mode="bilinear")
        return self.decoder(self.post_quant_conv(x))

    @torch.no_grad()
    def encode(self, images: Tensor | Image.Image | list[Image.Image], pooled: bool = True) -> Encoded:
        """Codes and pooled embedding of images: (B, 3, h, w) in [-1, 1], or PIL images of any size, which `preprocess`
        crops. ValueError for a tensor of another size, and for no images.

        `pooled=False` spares the layers behind the codes, where only codes are wanted.
        """
        if not isinstance(images, Tensor):
            images = self._pixels(images)
        check_images(images, self.config)
        output = self(images, reconstruct=False, pooled=pooled)
        codes = {name: codes.unflatten(1, self.config.grid) for name, codes in output.codes.items()}
        return Encoded(codes, output.pooled)

    @torch.no_grad()
    def decode(self, codes: dict[str, Tensor] | Encoded) -> Tensor:
        """Codes (B, rows, columns, D) by stream, or what `encode` gave -> images (B, 3, h, w), clamped to [-1, 1].

        The streams that feed the picture are read, others may be there; ValueError where one is missing or misshapen,
        or holds a code that there is not. `to_image` makes a PIL image of each.
        """
        codes = codes.codes if isinstance(codes, Encoded) else codes
        check_picture_codes(codes, self.config)
        for name in self.config.feeding("picture"):
            size = self.config.streams[name].codebook_size
            if codes[name].numel() and not 0 <= codes[name].min() <= codes[name].max() < size:
                raise ValueError(f"{name} codes are 0 to {size - 1}, here {codes[name].min()} to {codes[name].max()}")
        embedded = {name: self.embed(codes[name], name).flatten(1, 2) for name in self.config.feeding("picture")}
        return self._decode(embedded).clamp(-1, 1)

    def embed(self, codes: Tensor, stream: str) -> Tensor:
        """Sum over depths of a stream's code vectors: (..., D) ints -> (..., C)."""
        return self.quantizers[stream].embed(codes)

    def preprocess(self, image: Image.Image) -> Tensor:
        """A PIL image -> (3, h, w) in [-1, 1]: shortest side resized (bicubic), centre crop (paper section A5)."""
        return to_tensor(centre_crop(image, self.config.image_size))

    def _pixels(self, images: Image.Image | list[Image.Image]) -> Tensor:
        """PIL images as (B, 3, h, w)."""
        images = [images] if isinstance(images, Image.Image) else list(images)
        if wrong := [type(image).__name__ for image in images if not isinstance(image, Image.Image)]:
            raise ValueError(f"images are a tensor or PIL images, not {wrong[0]}")
        if not images:
            raise ValueError("there are no images")
        return torch.stack([self.preprocess(image) for image in images]).to(next(self.parameters()).device)

    def __repr__(self) -> str:
        """One line: torch's would list thousands of modules."""
        config, (rows, columns) = self.config, self.config.grid
        streams = ", ".join(f"{s.name} {s.depth} of {s.codebook_size:,}" for s in config.code_streams)
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"DualToken({config.image_size} px, {rows} x {columns} positions; codes a position: {streams}; "
            f"{parameters / 1e6:,.1f} M parameters)"
        )

    def fingerprint(self) -> str:
        """sha256 of the codebooks and of the fields that define codes: equal for interchangeable codes."""
        return fingerprint(self.config, {stream: self.codebook(stream) for stream in self.config.streams})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save(folder)
        save_model(self, str(folder / "model.safetensors"))

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "DualToken":
        """Read what save_pretrained wrote, in eval mode on `device`; ValueError where that is not all there."""
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
        """Take the weights that save_pretrained wrote; ValueError where they are damaged or do not fit."""
        path = _weights_file(folder)
        try:
            load_model(self, str(path), device=str(next(self.parameters()).device))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"'{path}' has not the weights of its config.json: {_first_lines(error)}") from error


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
    reach = MAX_ASPECT * min(image.size)
    if max(image.size) > reach:  # a line of pixels, say, which would grow to any size: what lies far off is not seen
        width, height = image.size
        left, top = max(0, (width - reach) // 2), max(0, (height - reach) // 2)
        image = image.crop((left, top, width - left, height - top))
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
    for stream in config.streams:
        digest.update(codebooks[stream].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _first_lines(error: Exception) -> str:
    """Of torch's errors the second line says what is wrong."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def _weights_file(folder: str | Path) -> Path:
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"no DualToken in '{folder}': it holds no model.safetensors")
    return path


@dataclass
class CodebookSet:
    """What data and language models need of a DualToken: its streams, their code vectors (K, C) fp32 by name, the
    fingerprint of its codes, the grid of positions, and the streams that pictures are decoded from.
    """

    streams: list[Stream]
    vectors: dict[str, Tensor]
    fingerprint: str
    grid: tuple[int, int]
    picture: list[str]


def read_codebooks(folder: str | Path) -> CodebookSet:
    """A saved DualToken's codebooks, without building the model; ValueError where each depth has one of its own."""
    config = DualTokenConfig.load(folder)
    if by_depth := [name for name, stream in config.streams.items() if not stream.shared_codebook]:
        raise ValueError(
            f"'{folder}': the streams {', '.join(by_depth)} have a codebook for each depth; data and language models "
            "take one for all depths"
        )
    path, vectors = _weights_file(folder), {}
    try:
        with safe_open(str(path), framework="pt") as weights:
            for name, stream in config.streams.items():
                codes = weights.get_tensor(f"quantizers.{name}.codebooks.0.weight")[:-1].float()
                if codes.shape != (stream.codebook_size, stream.code_dim):
                    raise ValueError(f"'{path}': stream '{name}' has codes of another shape than in its config.json")
                vectors[name] = codes
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged, or no DualToken's: {error}") from error
    return CodebookSet(
        config.code_streams, vectors, fingerprint(config, vectors), config.grid, config.feeding("picture")
    )
