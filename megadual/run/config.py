"""The keys that all trainings share."""

import dataclasses
import os
from importlib.util import find_spec
from pathlib import Path

from megadual.errors import UserError
from megadual.keys import key


@dataclasses.dataclass
class RunConfig:
    dir: str = key(about="the run's folder: logs, metrics, checkpoints, and what it makes")
    name: str = key("run", "its name in wandb")
    wandb: str = key(
        "disabled", "whether wandb gets what metrics.jsonl does", choices=("online", "offline", "disabled")
    )
    wandb_project: str = key("megadual", "wandb's project")
    tensorboard: bool = key(False, "write the same to RUN/tensorboard")
    profile: list[int] | None = key(
        None,
        "first and last step to profile: RUN/profile gets a trace and a table of where the time went",
        least=1,
    )
    device: str | None = key(
        None,
        "cuda: every rank must have its GPU; cpu: none is used; null: what there is",
        choices=("cuda", "cpu", None),
    )
    ranks: int | None = key(
        None,
        "processes of a start on this machine without a launcher; null: as few as the layout takes, or with "
        "parallel.layout=auto one for each GPU",
        least=1,
    )
    hang_timeout: float | None = key(
        1200.0, "seconds without progress after which a rank shows its stacks and exits; null: never", over=0
    )

    def check(self, steps: int) -> None:
        """UserError for what can't work on this machine in a run of `steps`, or does not go together."""
        if "://" in self.dir:
            raise UserError(
                f"run.dir={self.dir} is a URL; a run's folder is on a disk that all its processes see: give a path, "
                "and copy what is to be kept afterwards"
            )
        folder = Path(self.dir)
        folders = folder, *folder.parents, folder / "logs", folder / "checkpoints"
        if file := next((path for path in folders if path.is_file()), None):
            raise UserError(f"run.dir={self.dir}: '{file}' is a file; give the path of a folder")
        if self.profile is not None and not (len(self.profile) == 2 and self.profile[0] <= self.profile[1]):
            raise UserError(f"run.profile={self.profile} must be two steps, the first and the last, as in [10,12]")
        if self.profile is not None and self.profile[0] > steps:
            raise UserError(f"run.profile={self.profile} begins after the last step: train.steps={steps}")
        if self.tensorboard and find_spec("tensorboard") is None:
            raise UserError("run.tensorboard=true needs the tensorboard package: pip install tensorboard")

    def use_device(self) -> None:
        """Hide the GPUs where `device` is cpu. To be called before CUDA starts."""
        if self.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""


@dataclasses.dataclass
class CheckpointConfig:
    every: int | None = key(
        1000, "steps between checkpoints; the last step is saved too; null: none but at a signal", least=1
    )
    keep: int = key(2, "newest checkpoints kept", least=1)
    resume: bool = key(True, "go on from run.dir's latest checkpoint, where there is one")
    start: str | None = key(None, "else take weights from here; the optimizer starts anew")

    def due(self, step: int, steps: int) -> bool:
        """Whether a checkpoint is to be written after `step` of `steps`."""
        return self.every is not None and (step % self.every == 0 or step == steps)


@dataclasses.dataclass
class OptimConfig:
    """AdamW and its learning rate: a linear warm-up, then what `schedule` says."""

    lr: float = key(3e-4, "peak learning rate", least=0)
    min_lr: float = key(0.0, "learning rate that a schedule decays to", least=0)
    warmup_steps: int = key(0, "steps up to the peak", least=0)
    schedule: str = key(
        "cosine",
        "after the warm-up: cosine down to min_lr, constant, or wsd: constant, then linearly down to min_lr",
        choices=("cosine", "constant", "wsd"),
    )
    decay_steps: int | None = key(None, "steps of wsd's decay, the last ones", least=1)
    weight_decay: float = key(0.1, "decoupled, of matrices", least=0)
    beta1: float = key(0.9, "decay of AdamW's first moment", least=0, below=1)
    beta2: float = key(0.95, "decay of AdamW's second moment", least=0, below=1)

    def check(self, place: str, steps: int) -> None:
        """UserError where the keys under `place` give no schedule over `steps`."""
        if self.min_lr > self.lr:
            raise UserError(f"{place}.min_lr={self.min_lr} must not be over {place}.lr={self.lr}, which decays to it")
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise UserError(
                f"{place}.schedule={self.schedule} with {place}.decay_steps={self.decay_steps}: give both wsd and the "
                "steps of its decay, or neither"
            )
        if self.decay_steps and self.warmup_steps + self.decay_steps > steps:
            raise UserError(
                f"{place}.warmup_steps({self.warmup_steps}) + {place}.decay_steps({self.decay_steps}) = "
                f"{self.warmup_steps + self.decay_steps} are more than the {steps} steps that there are"
            )


@dataclasses.dataclass
class TrainConfig(OptimConfig):
    """Steps, precision, and what is done about a loss that can't be right."""

    steps: int = key(about="optimizer steps in all", least=1)
    seed: int = key(0, "of initial weights, data order and whatever else is drawn", least=0, most=2**32 - 1)
    precision: str = key("fp32", "of products; weights are kept in fp32", choices=("fp32", "bf16"))
    clip_grad: float = key(1.0, "largest norm of the gradient; 0: any", least=0)
    bad_loss: str = key(
        "stop", "at a loss that is not finite, or spikes: stop, or skip the step's update", choices=("stop", "skip")
    )
    spike_factor: float | None = key(
        None, "a loss over this many times the median of the steps before is bad; null: none is", over=0
    )
    spike_window: int = key(64, "steps of that median", least=1)
    max_skipped: int = key(8, "stop after this many skipped steps in a row", least=1)
