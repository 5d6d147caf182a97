"""AdamW and its schedule, of the trainings of this package."""

import math

import torch
from torch import nn

from megadual.run.config import OptimConfig


def adamw(modules: list[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases, norms and other vectors are not decayed."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Of one of `steps` steps, where `step` counts from 0: linear warm-up, then the config's schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        left = min(1.0, (steps - step) / config.decay_steps)
    else:
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        left = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(modules: list[nn.Module], most: float) -> float:
    """Clip the gradient to the norm `most` (0: any) and return the norm that it had."""
    parameters = [p for module in modules for p in module.parameters()]
    return nn.utils.clip_grad_norm_(parameters, most or math.inf).item()
