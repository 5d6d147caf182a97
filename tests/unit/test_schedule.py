"""The learning rates of a run's steps, in pretraining and in the tokenizer's training."""

import math
from types import SimpleNamespace

import pytest

from megadual.errors import UserError
from megadual.run.config import TrainConfig
from megadual.testing import tiny
from megadual.vision.optim import learning_rate

PEAK, LEAST, STEPS, WARMUP, DECAY = 1e-3, 1e-4, 20, 4, 6
KEYS = {"lr": PEAK, "min_lr": LEAST, "steps": STEPS, "warmup_steps": WARMUP}
SCHEDULES = {"cosine": {}, "constant": {}, "wsd": {"decay_steps": DECAY}}


def expected(schedule: str, step: int) -> float:
    """After the warm-up; `step` counts from 0, and after STEPS of them the rate would be LEAST."""
    if schedule == "constant":
        return PEAK
    if schedule == "cosine":
        return LEAST + (PEAK - LEAST) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
    return PEAK if step <= STEPS - DECAY else LEAST + (PEAK - LEAST) * (STEPS - step) / DECAY


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_of_both_trainings(schedule, tmp_path):
    from megadual.engine.schedule import schedule as scheduler

    more = SCHEDULES[schedule]
    config = TrainConfig(**KEYS, schedule=schedule, **more)
    tokenizer = [learning_rate(config, step, STEPS) for step in range(STEPS)]
    keys = [f"train.{name}={value}" for name, value in {**KEYS, "schedule": schedule, **more}.items()]
    optimizer = SimpleNamespace(param_groups=[{}])
    steps, pretraining = scheduler(tiny.tiny_run(tmp_path, tmp_path, *keys), optimizer), []
    for _ in range(STEPS):
        pretraining.append(optimizer.param_groups[0]["lr"])
        steps.step(increment=1)
    after = [expected(schedule, step) for step in range(WARMUP, STEPS)]
    assert tokenizer == pytest.approx([PEAK * (step + 1) / WARMUP for step in range(WARMUP)] + after)
    assert pretraining == pytest.approx([PEAK * (step + 1) / (WARMUP + 1) for step in range(WARMUP)] + after)


@pytest.mark.parametrize("keys, message", [
    ({"schedule": "wsd"}, "train.schedule=wsd with train.decay_steps=None: give both"),
    ({"decay_steps": 5}, "train.schedule=cosine with train.decay_steps=5: give both"),
    ({"schedule": "wsd", "decay_steps": 17}, r"train.warmup_steps\(4\) \+ train.decay_steps\(17\) = 21 are more than"),
])  # fmt: skip
def test_keys_that_give_no_schedule(keys, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**KEYS, **keys).check("train", STEPS)
