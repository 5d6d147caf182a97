"""Checkpoints written in the background from GPUs, taken up under the same and other layouts, through NCCL."""

import pytest
import torch

from megadual.testing import layouts, tiny
from megadual.testing.checkpoints import train_part, train_through
from megadual.testing.distributed import run_distributed

STEPS, SAVED = 6, 3
LAYOUTS = layouts.LAYOUTS | {"one": (1, [])}
PAIRS = [
    ("one", "one"), ("TP2+SP", "PP2"), ("PP2xVPP2", "DP2"), ("DP2", "DeepSpeed ZeRO-3 DP2"),
    ("DeepSpeed ZeRO-3 DP2", "TP2"), ("DeepSpeed PP2", "CP2"), ("DeepSpeed ZeRO-1 DP2", "DeepSpeed ZeRO-1 DP2"),
]  # fmt: skip


@pytest.mark.parametrize(
    "saved, loaded",
    [pair for pair in PAIRS if max(LAYOUTS[name][0] for name in pair) <= torch.cuda.device_count()],
)
def test_resume(tmp_path, saved, loaded):
    shards = tiny.write_tiny_set(tmp_path / "set")

    def run_as(layout):
        return tiny.tiny_run(tmp_path, shards, f"train.steps={STEPS}", "train.warmup_steps=2", *LAYOUTS[layout][1])

    straight = run_distributed(train_through, LAYOUTS[saved][0], run_as(saved), SAVED, backend="nccl")[0]
    got, _ = run_distributed(train_part, LAYOUTS[loaded][0], run_as(loaded), SAVED, STEPS, False, backend="nccl")[0]
    # Not bitwise: a GPU's atomic additions come in any order.
    loss, grad_norm = layouts.differences(got, straight[SAVED:])
    assert loss < 1e-5 and grad_norm < 1e-4
