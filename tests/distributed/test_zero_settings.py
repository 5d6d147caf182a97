"""DeepSpeed's own settings of ZeRO change what is held and sent when, not what is computed."""

import pytest

from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.layouts import LAYOUTS, TOLERANCE, differences

WEIGHTS_KEPT = ["stage3_prefetch_bucket_size=5e8", "stage3_max_live_parameters=1e10", "stage3_max_reuse_distance=1e10"]


@pytest.fixture(scope="module")
def run_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    shards = tiny.write_tiny_set(folder / "set")
    return lambda *overrides: tiny.tiny_run(folder, shards, "train.steps=3", *overrides)


@pytest.mark.parametrize("settings", [["contiguous_gradients=0"], WEIGHTS_KEPT], ids=["no bucket", "weights kept"])
def test_settings_change_no_number(run_in, settings):
    (expected,) = run_distributed(tiny.losses, 1, run_in())
    given = [f"parallel.zero.{each}" for each in settings]
    got = run_distributed(tiny.losses, 2, run_in(*LAYOUTS["DeepSpeed ZeRO-3 DP2"][1], *given))
    assert max(differences(got[0], expected)) < TOLERANCE["fp32"]


def test_unknown_settings_are_told(run_in):
    with pytest.raises(RuntimeError, match=r"UserError: parallel.zero.contiguos_gradients: DeepSpeed says: Extra"):
        run_distributed(tiny.losses, 1, run_in("engine=deepspeed", "parallel.zero.contiguos_gradients=0"))
