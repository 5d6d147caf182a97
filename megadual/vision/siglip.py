"""Training a small SigLIP from scratch on image-caption pairs (sigmoid loss), the teacher where none can be loaded.

One process is enough at these sizes. The folder written is a HF SiglipModel's with its text tokenizer and image
processor, so that `SiglipModel.from_pretrained` and `AutoProcessor` read it as they read a published one.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange
from transformers import PreTrainedTokenizerBase, SiglipConfig, SiglipImageProcessorPil, SiglipModel

from megadual.errors import UserError
from megadual.text import load_text_tokenizer

from .data import DataConfig, TrainingImages, read_pairs, tokenize_captions, training_batches
from .loop import OptimConfig, Ranks, RunLog, WandbConfig, adamw, learning_rate, set_learning_rate
from .metrics import retrieval_r1


@dataclass
class SiglipSize:
    image_size: int = 64
    patch_size: int = 8
    hidden_size: int = 96
    intermediate_size: int = 288
    vision_layers: int = 6
    text_layers: int = 3
    heads: int = 4
    text_length: int = 32


@dataclass
class TrainSiglipConfig:
    output: str = "runs/demo/siglip"
    text_tokenizer: str = "runs/demo/text_tokenizer"
    heldout: str | None = None  # pairs on which retrieval is measured at the end
    seed: int = 0
    steps: int = 600
    model: SiglipSize = field(default_factory=SiglipSize)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


def build(size: SiglipSize, tokenizer: PreTrainedTokenizerBase) -> SiglipModel:
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shared = {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_attention_heads": size.heads,
    }
    text = {
        **shared,
        **special,
        "num_hidden_layers": size.text_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": size.text_length,
        "projection_size": size.hidden_size,
    }
    vision = {
        **shared,
        "num_hidden_layers": size.vision_layers,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
    }
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def sigmoid_loss(logits_BB: Tensor) -> Tensor:
    """SigLIP's loss: every pair of the batch is a yes (diagonal) or a no; summed over a row, averaged over rows."""
    labels_BB = 2 * torch.eye(len(logits_BB), device=logits_BB.device) - 1
    return -F.logsigmoid(labels_BB * logits_BB).sum(dim=1).mean()


@torch.no_grad()
def text_embeddings(siglip: SiglipModel, tokenizer, captions: list[str], batch_size: int = 128) -> Tensor:
    """Pooled text embeddings (n, P) of captions."""
    length = siglip.config.text_config.max_position_embeddings
    ids = tokenize_captions(tokenizer, captions, length).to(siglip.device)
    return torch.cat([siglip.text_model(chunk).pooler_output for chunk in ids.split(batch_size)])


@torch.no_grad()
def image_embeddings(siglip: SiglipModel, images: Tensor, batch_size: int = 128) -> Tensor:
    """Pooled image embeddings (n, P) of the unquantised path."""
    chunks = images.split(batch_size)
    return torch.cat([siglip.vision_model(chunk.to(siglip.device)).pooler_output for chunk in chunks])


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A text tokenizer that can pad."""
    tokenizer = load_text_tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or "<|endoftext|>"
    return tokenizer


def load_siglip(folder: str | Path) -> SiglipModel:
    """A frozen SigLIP in eval mode from a local folder or hub id; UserError where there is none."""
    try:
        return SiglipModel.from_pretrained(str(folder)).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise UserError(f"no SigLIP in '{folder}': {str(error).splitlines()[0]}") from error


def train(config: TrainSiglipConfig) -> dict[str, float]:
    """Train and write the folder; returns the last step's metrics with the held-out retrieval."""
    ranks = Ranks.join()
    if ranks.size > 1:
        raise UserError(f"training SigLIP is for one process, {ranks.size} were started")
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.text_tokenizer)
    siglip = build(config.model, tokenizer).to(ranks.device).train()
    # A start at which the many negatives of a batch cost no more than its positives.
    siglip.logit_scale.data.fill_(math.log(10.0))
    siglip.logit_bias.data.fill_(-math.log(config.data.batch_size))
    optimizer = adamw([siglip], config.optim)
    batches = training_batches(TrainingImages(config.data, config.model.image_size, config.seed))
    output = Path(config.output)
    log = RunLog(config, output / "training", ranks, config.wandb)
    for step in trange(config.steps, desc="SigLIP", unit="step", mininterval=10):
        start = time.perf_counter()
        batch = next(batches)
        lr = learning_rate(config.optim, step, config.steps)
        set_learning_rate(optimizer, lr)
        ids = tokenize_captions(tokenizer, batch.captions, config.model.text_length).to(ranks.device)
        loss = sigmoid_loss(siglip(input_ids=ids, pixel_values=batch.images.to(ranks.device)).logits_per_image)
        optimizer.zero_grad()
        loss.backward()
        if config.optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(siglip.parameters(), config.optim.clip_norm)
        optimizer.step()
        metrics = {"loss": loss.item(), "lr": lr, "images_per_s": len(batch.images) / (time.perf_counter() - start)}
        log.write(step + 1, metrics)
    siglip.eval()
    if config.heldout:
        images, captions = read_pairs(config.heldout, config.model.image_size)
        scores = image_embeddings(siglip, images), text_embeddings(siglip, tokenizer, captions)
        metrics["retrieval_r1"] = retrieval_r1(*scores, captions)
        metrics["chance"] = 1 / len(captions)
    log.close()
    siglip.save_pretrained(output)
    tokenizer.save_pretrained(output)
    side = config.model.image_size
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(output)
    return metrics
