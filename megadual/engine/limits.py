"""What the values of a run's config may be, each by itself; what they may be together is in topology.py."""

from operator import attrgetter

from megadual.config import PretrainConfig
from megadual.errors import UserError

CHOICES = {
    "engine": ("megatron", "deepspeed"),
    "parallel.zero_stage": (1, 2, 3),
    "train.precision": ("fp32", "bf16"),
    "train.bad_loss": ("stop", "skip"),
    "run.wandb": ("online", "offline", "disabled"),
    "run.device": ("cuda", "cpu", None),
}
AT_LEAST_1 = (
    "parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.context",
    "train.steps", "train.global_batch_tokens", "train.micro_batch_size", "train.seq_len", "train.spike_window",
    "train.max_skipped", "checkpoint.every", "checkpoint.keep", "run.samples_every",
)  # fmt: skip
NOT_NEGATIVE = (
    "train.seed", "train.lr", "train.min_lr", "train.warmup_steps", "train.weight_decay", "train.clip_grad",
)  # fmt: skip
POSITIVE = ("train.spike_factor", "run.hang_timeout", "parallel.gpu_memory_gib")
SHARES = ("data.draw_probability", "data.caption_dropout", "train.beta1", "train.beta2")


def check_limits(run: PretrainConfig) -> None:
    """UserError names the first value that is out of its limits; null passes where it is the default."""

    def check(names: tuple[str, ...], fits, limit: str) -> None:
        for name in names:
            value = attrgetter(name)(run)
            if value is not None and not fits(value):
                raise UserError(f"{name}={value} must be {limit}")

    for name, known in CHOICES.items():
        if (value := attrgetter(name)(run)) not in known:
            raise UserError(f"{name} '{value}' is unknown; known: {', '.join(map(str, filter(None, known)))}")
    check(AT_LEAST_1, lambda value: value >= 1, "at least 1")
    check(NOT_NEGATIVE, lambda value: value >= 0, "0 or more")
    check(POSITIVE, lambda value: value > 0, "over 0")
    check(SHARES, lambda value: 0 <= value <= 1, "between 0 and 1")
    check(("train.beta1", "train.beta2"), lambda value: value < 1, "below 1")
    if run.train.min_lr > run.train.lr:
        raise UserError(f"train.min_lr={run.train.min_lr} must not be over train.lr={run.train.lr}, which decays to it")
    for name, weight in run.train.loss.items():
        if weight < 0:
            raise UserError(f"train.loss.{name}={weight} must be 0 or more")
    if not run.data.sets:
        raise UserError("data.sets=[] names no shard set; make one with data_pipeline/tokenize.py")
