"""What both trainers of this package share: ranks, optimiser, schedule, the run's log."""

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from megadual.config import to_yaml
from megadual.run.step_log import StepLog


@dataclass
class OptimConfig:
    lr: float = 7.2e-5
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    eps: float = 1e-8
    weight_decay: float = 1e-4
    warmup_steps: int = 10000
    final_lr: float = 0.0  # share of lr at the end of the cosine
    clip_norm: float | None = None


@dataclass
class WandbConfig:
    mode: str = "disabled"  # online, offline or disabled
    project: str = "megadual"


@dataclass
class Ranks:
    """This process among those that torchrun started; a plain start is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> "Ranks":
        """Join the process group that torchrun's environment describes, if it does."""
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if not dist.is_initialized():
            return cls(0, 1, device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; all ranks give the same keys."""
        if self.size == 1:
            return values
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(packed)
        return dict(zip(values, (packed / self.size).tolist(), strict=True))

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of a tensor, which may be changed in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def adamw(modules: list[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases, norms and other vectors are not decayed."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warmup, then a cosine that ends at final_lr; `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class RunLog:
    """config.yaml, metrics.jsonl (one object a step) and wandb of a run's folder; only rank 0 writes."""

    def __init__(self, config, folder: Path, ranks: Ranks, wandb_config: WandbConfig, start_step: int = 0):
        self.main = ranks.main
        if not self.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
        self.steps = StepLog(folder, start_step, wandb_config.mode, wandb_config.project, folder.name, asdict(config))

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.main:
            self.steps.write({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}})

    def write_image(self, step: int, name: str, image: Image.Image) -> None:
        """To wandb alone."""
        if self.main:
            self.steps.picture(step, name, image)

    def close(self) -> None:
        if self.main:
            self.steps.close()
