"""What `ablation.py` runs: the variants, the SigLIP that they share, training and measuring one of them."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from ablation_training import CodebookUpdates, fit
from safetensors.torch import load_file, save_file
from torch import Tensor

from megadual.synthetic.corpus import make_corpus
from megadual.text import save_text_tokenizer, train_text_tokenizer
from megadual.vision import DualToken
from megadual.vision.config import DualTokenConfig, StreamConfig
from megadual.vision.data import read_pairs, tokenize_captions
from megadual.vision.losses import LossWeights, distillation
from megadual.vision.metrics import code_usage, psnr, retrieval_r1, ssim
from megadual.vision.siglip import SiglipSize, image_embeddings, load_siglip, sigmoid_loss, text_embeddings
from megadual.vision.siglip import build as build_siglip
from megadual.vision.tokenizer import finish, hidden_states


@dataclass
class Settings:
    """Sizes and budgets; every variant and seed has the same."""

    train_images: int = 20000
    heldout_images: int = 4000  # so many that the teacher does not find them all
    image_size: int = 64
    patch_size: int = 8
    width: int = 192
    layers: int = 12  # the deep layer is the last but one, the shallow one ends the first quarter
    text_layers: int = 4
    siglip_steps: int = 1000
    siglip_batch: int = 256
    steps: int = 700
    batch: int = 64
    codebook_size: int = 1024
    depth: int = 4  # codes per position and stream
    decoder_channels: int = 32
    lr: float = 5e-4

    @property
    def deep(self) -> int:
        return self.layers - 1

    @property
    def shallow(self) -> int:
        return max(1, self.layers // 4)

    @property
    def shared(self) -> dict:
        """What the corpus and the SigLIP depend on."""
        own = ("steps", "batch", "codebook_size", "depth", "decoder_channels", "lr")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in own}


TINY = Settings(
    train_images=600, heldout_images=100, image_size=32, width=96, layers=4, text_layers=2, siglip_steps=200,
    siglip_batch=64, steps=200, batch=16, codebook_size=128, depth=2, decoder_channels=16, lr=1e-3,
)  # fmt: skip
PRESETS = {"small": Settings(), "tiny": TINY}


@dataclass(frozen=True)
class Variant:
    """`streams` gives each stream's layer, "deep" or "shallow", and what it feeds; `paper` holds zero-shot accuracy,
    rFID, PSNR and SSIM of the paper's row (So/14-384 on ImageNet).
    """

    label: str
    streams: dict[str, tuple[str, list[str]]]
    codes: int = 1  # times Settings.depth, per stream
    pixels: float = 1.0  # weight of the reconstruction, relative to the others'
    paper: tuple[str, ...] = ("", "", "", "")

    @property
    def semantic(self) -> bool:
        return any("teacher" in feeds for _, feeds in self.streams.values())


ONE = {"both": ("deep", ["teacher", "picture"])}
DUAL = {"semantic": ("deep", ["teacher"]), "pixel": ("shallow", ["picture"])}
VARIANTS = {
    "one_deep": Variant("(a) one codebook, deep layer", ONE, paper=("72.3", "3.86", "12.64", ".574")),
    "one_deep_2x": Variant("(a) with twice the codes", ONE, codes=2),
    "pixel_deep": Variant(
        "(b) pixels only, deep layer", {"pixel": ("deep", ["picture"])}, paper=("–", ".27", "27.88", ".722")
    ),
    "pixel_shallow": Variant(
        "(c) pixels only, shallow layer", {"pixel": ("shallow", ["picture"])}, paper=("–", ".29", "28.12", ".745")
    ),
    "dual": Variant("(d) dual: shallow and deep", DUAL, paper=("82.0", ".25", "28.69", ".744")),
    "one_deep_pixels": Variant("(a), pixels weighted 8 x", ONE, pixels=8),
    "dual_pixels": Variant("(d), pixels weighted 8 x", DUAL, pixels=8),
}


def build_tokenizer(variant: Variant, settings: Settings, siglip) -> DualToken:
    grid = settings.image_size // settings.patch_size
    levels = settings.patch_size.bit_length()  # the decoder doubles the grid until it is the image
    config = DualTokenConfig(
        siglip=siglip.config.to_dict(),
        streams={  # all codebooks move once a step, so that only the layers differ
            name: StreamConfig(
                layers=[getattr(settings, layer)],
                feeds=feeds,
                depth=settings.depth * variant.codes,
                codebook_size=settings.codebook_size,
                code_dim=32,
            )
            for name, (layer, feeds) in variant.streams.items()
        },
        decoder_latent=grid,
        decoder_in_channels=settings.width,
        decoder_channels=settings.decoder_channels,
        decoder_multipliers=[1, 2, 2, 4, 4, 8][:levels],
        decoder_res_blocks=1,
        decoder_attention=[],
        decoder_norm_groups=16,
    )
    return DualToken(config, siglip_model=siglip)


def loss_weights(variant: Variant, images: Tensor, features: Tensor, pooled: Tensor) -> LossWeights:
    """Stage 1's, each MSE in units of the variance of what is predicted: these have no common scale."""
    return LossWeights(
        reconstruction=5 * variant.pixels / images.var().item(),
        feature_mse=5 / features.var().item(),
        feature_cos=5,
        pooled_mse=1 / pooled.var().item(),
        pooled_cos=1,
        lpips=0.0,
        gan=0.0,
    )


def load_parts(output: Path, device: torch.device) -> dict[str, Tensor]:
    """{"train": uint8 images, "heldout": float images in [-1, 1], "texts": the teacher's held-out embeddings}."""
    parts = load_file(output / "parts.safetensors", device=str(device))
    return {**parts, "heldout": parts["heldout"].float() / 127.5 - 1}


def prepare(output: Path, settings: Settings, device: torch.device) -> None:
    """The corpus, the text tokenizer and the SigLIP that all runs share, and the teacher's own scores."""
    make_corpus(output / "corpus", settings.train_images, settings.heldout_images, settings.image_size)
    train, train_captions = read_pairs(str(output / "corpus/train-*.tar"), settings.image_size)
    heldout, captions = read_pairs(str(output / "corpus/heldout-*.tar"), settings.image_size)
    as_bytes = [((x + 1) * 127.5).round().to(torch.uint8) for x in (train, heldout)]
    tokenizer = train_text_tokenizer(train_captions, vocab_size=1024)
    save_text_tokenizer(tokenizer, output / "siglip")

    torch.manual_seed(0)
    size = SiglipSize(
        settings.image_size, settings.patch_size, settings.width, 4 * settings.width, settings.layers,
        settings.text_layers, heads=settings.width // 32,
    )  # fmt: skip
    siglip = build_siglip(size, tokenizer).to(device).train()
    siglip.logit_scale.data.fill_(math.log(10.0))
    siglip.logit_bias.data.fill_(-math.log(settings.siglip_batch))
    ids = tokenize_captions(tokenizer, train_captions, size.text_length).to(device)

    def loss_of(images: Tensor, chosen: Tensor) -> Tensor:
        return sigmoid_loss(siglip(input_ids=ids[chosen], pixel_values=images).logits_per_image.float())

    seconds = fit(
        siglip, as_bytes[0].to(device), settings.siglip_batch, settings.siglip_steps, 1e-3, 0, loss_of, "SigLIP"
    )
    siglip.eval().save_pretrained(output / "siglip")
    images_NP = image_embeddings(siglip, heldout.to(device))
    texts_NP = text_embeddings(siglip, tokenizer, captions)
    save_file({"train": as_bytes[0], "heldout": as_bytes[1], "texts": texts_NP.cpu()}, output / "parts.safetensors")
    teacher = {
        "settings": settings.shared,
        "captions": captions,
        "image_to_text": retrieval_r1(images_NP, texts_NP, captions),
        "text_to_image": retrieval_r1(texts_NP, images_NP, captions),
        "seconds_per_step": seconds,
    }
    (output / "teacher.json").write_text(json.dumps(teacher, indent=1) + "\n")


@torch.no_grad()
def measure(model: DualToken, images: Tensor, texts_NP: Tensor, captions: list[str], semantic: bool) -> dict:
    """Reconstruction and retrieval through codes alone, in fp32."""
    chunks = [(model.encode(chunk), chunk) for chunk in images.split(100)]
    decoded = torch.cat([model.decode(encoded.codes) for encoded, _ in chunks])
    report = {
        "psnr": psnr(decoded, images).mean().item(),
        "ssim": ssim(decoded, images).mean().item(),
    }
    for name, stream in model.config.streams.items():
        codes = torch.cat([encoded.codes[name] for encoded, _ in chunks])
        report[f"code_usage_{name}"] = code_usage(codes, stream.codebook_size)
    if semantic:
        pooled_NP = torch.cat([encoded.pooled for encoded, _ in chunks])
        report["image_to_text"] = retrieval_r1(pooled_NP, texts_NP, captions)
        report["text_to_image"] = retrieval_r1(texts_NP, pooled_NP, captions)
    return report


def run(name: str, seed: int, output: Path, settings: Settings, device: torch.device) -> None:
    """Train and measure one variant; writes runs/NAME-SEED.json."""
    variant, shared = VARIANTS[name], json.loads((output / "teacher.json").read_text())
    parts = load_parts(output, device)
    torch.manual_seed(seed)
    model = build_tokenizer(variant, settings, load_siglip(output / "siglip")).to(device).train()
    teacher = load_siglip(output / "siglip").vision_model.to(device)

    @torch.no_grad()
    def wanted(images: Tensor) -> tuple[Tensor, Tensor]:
        features = hidden_states(teacher, images, settings.deep)[-1]
        return features, finish(teacher, features, settings.deep)

    some = parts["heldout"][:100]
    weights = loss_weights(variant, some, *wanted(some))

    def loss_of(images: Tensor, chosen: Tensor) -> Tensor:
        terms = distillation(model(images), images, *wanted(images))
        return sum(weights.of(term) * value for term, value in terms.items())

    label = f"{name}, seed {seed}"
    images, updates = parts["train"], CodebookUpdates(model)
    seconds = fit(
        model,
        images,
        settings.batch,
        settings.steps,
        settings.lr,
        seed,
        loss_of,
        label,
        capture=True,
        after_step=updates,
    )
    report = measure(model.eval(), parts["heldout"], parts["texts"], shared["captions"], variant.semantic)
    report = {"settings": dataclasses.asdict(settings), **report, "seconds_per_step": seconds}
    (output / "runs").mkdir(exist_ok=True)
    (output / f"runs/{name}-{seed}.json").write_text(json.dumps(report, indent=1) + "\n")
