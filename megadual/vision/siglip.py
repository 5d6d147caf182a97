"""Training a small SigLIP from scratch on image-caption pairs (sigmoid loss), the teacher where none can be loaded.

One process is enough at these sizes. The folder written is a HF SiglipModel's with its text tokenizer and image
processor, so that `SiglipModel.from_pretrained` and `AutoProcessor` read it as they read a published one.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, SiglipConfig, SiglipImageProcessorPil, SiglipModel
from transformers.utils import logging

from megadual.errors import UserError, first_line
from megadual.keys import key
from megadual.run.bad_loss import StepResult
from megadual.run.config import CheckpointConfig, RunConfig, TrainConfig
from megadual.run.ranks import Ranks
from megadual.run.session import session
from megadual.text import load_text_tokenizer

from .config import read_siglip_config
from .data import DataConfig, read_pairs, tokenize_captions
from .loop import Trainer, fit, judged
from .metrics import retrieval_r1
from .optim import adamw, clip, learning_rate, set_learning_rate


@dataclass
class SiglipSize:
    image_size: int = key(64, "side of the square images, in pixels", least=1)
    patch_size: int = key(8, "side of a patch, in pixels", least=1)
    hidden_size: int = key(96, "width of both towers", least=1)
    intermediate_size: int = key(288, "width of their feed-forward layers", least=1)
    vision_layers: int = key(6, "layers of the image tower", least=1)
    text_layers: int = key(3, "layers of the text tower", least=1)
    heads: int = key(4, "attention heads", least=1)
    text_length: int = key(32, "tokens of a caption; longer ones are cut", least=1)


@dataclass
class SiglipModelConfig(SiglipSize):
    text_tokenizer: str = key("runs/demo/text_tokenizer", "Hugging Face folder or id")


@dataclass
class TrainSiglipConfig:
    """The model is written to `run.dir` itself; retrieval is measured on `data.heldout` at the end."""

    model: SiglipModelConfig = field(default_factory=SiglipModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            lr=7.2e-5, beta1=0.5, beta2=0.9, weight_decay=1e-4, warmup_steps=10000, clip_grad=0.0, steps=600
        )
    )
    run: RunConfig = field(default_factory=lambda: RunConfig("runs/demo/siglip", name="siglip"))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def resolve(self) -> None:
        self.run.check(self.train.steps)
        self.train.check("train", self.train.steps)
        for whole, part in (("hidden_size", "heads"), ("image_size", "patch_size")):
            if getattr(self.model, whole) % getattr(self.model, part):
                raise UserError(
                    f"model.{whole}={getattr(self.model, whole)} does not divide by "
                    f"model.{part}={getattr(self.model, part)}"
                )
        if self.checkpoint.start:
            raise UserError("checkpoint.start: SigLIP starts from scratch here")
        if (self.run.ranks or 1) > 1:
            raise UserError(f"run.ranks={self.run.ranks}: training SigLIP is for one process")


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
        return SiglipModel.from_pretrained(str(folder), config=read_siglip_config(folder)).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise UserError(f"no SigLIP in '{folder}': {first_line(error)}") from error


class SiglipTrainer(Trainer):
    """The model, optimizer and pairs of a run."""

    def __init__(self, config: TrainSiglipConfig, ranks: Ranks):
        super().__init__(config, ranks)
        torch.manual_seed(config.train.seed)
        self.tokenizer = load_tokenizer(config.model.text_tokenizer)
        self.model = build(config.model, self.tokenizer).to(ranks.device).train()
        # A start at which the many negatives of a batch cost no more than its positives.
        self.model.logit_scale.data.fill_(math.log(10.0))
        self.model.logit_bias.data.fill_(-math.log(config.data.batch_size))
        self.optimizer = adamw([self.model], config.train)
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    def step(self, approve: Callable[[StepResult], bool] | None = None) -> dict[str, float]:
        config, device, start = self.config.train, self.ranks.device, time.perf_counter()
        self.keys = []
        batch = self.next_batch()
        lr = learning_rate(config, self.steps_done, config.steps)
        set_learning_rate(self.optimizer, lr)
        ids = tokenize_captions(self.tokenizer, batch.captions, self.config.model.text_length).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = self.model(input_ids=ids, pixel_values=batch.pixels(device)).logits_per_image
        loss = sigmoid_loss(logits.float())
        self.optimizer.zero_grad()
        loss.backward()
        metrics = {"loss": loss.item(), "grad_norm": clip([self.model], config.clip_grad), "lr": lr}
        if approve is None or approve(judged(metrics)):
            self.optimizer.step()
        self.steps_done += 1
        return metrics | {"images_per_s": len(batch.images) / (time.perf_counter() - start)}

    @torch.no_grad()
    def retrieval(self) -> dict[str, float]:
        """R@1 on the held-out pairs, image to text."""
        images, captions = read_pairs(self.config.data.heldout, self.config.model.image_size)
        scores = image_embeddings(self.model, images), text_embeddings(self.model, self.tokenizer, captions)
        return {"retrieval_r1": retrieval_r1(*scores, captions), "chance": 1 / len(captions)}


def train(config: TrainSiglipConfig) -> dict[str, float]:
    """Train and write the folder; returns the last step's metrics (`fit`) with the held-out retrieval."""
    if (ranks := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise UserError(f"training SigLIP is for one process, {ranks} were started")
    config.data.check()
    with session(config.run, config) as opened:
        trainer = SiglipTrainer(config, opened.ranks)
        metrics = fit(config, trainer, opened)
        trainer.model.eval()
        if config.data.heldout:
            metrics |= trainer.retrieval()
        logging.set_verbosity_error()  # saved is what differs from transformers' defaults, of which it warns itself
        trainer.model.save_pretrained(opened.folder)
        trainer.tokenizer.save_pretrained(opened.folder)
        side = config.model.image_size
        SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(opened.folder)
    return metrics
