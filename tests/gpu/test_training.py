"""Twenty steps of the engine, NCCL with one rank, against the same on the CPU with gloo: weights and data are equal."""

import json
import os
import subprocess
import sys

import pytest

from megadual.testing import tiny
from megadual.testing.layouts import differences


def losses(precision: str) -> list[dict]:
    """Train a tiny model on random documents on what this process sees, a GPU or the CPU."""
    import torch
    import torch.distributed as dist

    from megadual.data.dataset import collate
    from megadual.data.layout import Reading, to_sequence
    from megadual.engine.megatron import MegatronEngine
    from megadual.engine.topology import topology
    from megadual.testing.shards import random_documents
    from megadual.train.metrics import numbers_of

    documents = random_documents(
        80, grid=tiny.GRID, streams=tiny.STREAMS, vocabulary=tiny.TEXT_VOCABULARY, images=(0, 2)
    )
    batches = []
    for first in range(0, len(documents), 4):
        some = documents[first : first + 4]
        sequences = [
            to_sequence(d, tiny.SPECIAL, Reading(tuple(i % 2 == 0 for i in range(len(d.grids))))) for d in some
        ]
        batches.append(collate(sequences, tiny.SPECIAL, [d.key for d in some]))
    run = tiny.tiny_run("unused", "unused", f"train.precision={precision}", "parallel.stage_layers=[4]")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    engine = MegatronEngine(run, topology(run, 1), tiny.vocabulary())
    results = [numbers_of(engine.train_step([batch])) for batch in batches]
    dist.destroy_process_group()
    return results


# In bf16 the CPU's own losses are 1e-3 from those in fp32, and gradients differ more.
@pytest.mark.parametrize("precision, loss, grad_norm", [("fp32", 1e-5, 1e-4), ("bf16", 5e-3, 3e-2)])
def test_losses_are_the_cpus(precision, loss, grad_norm):
    seen = {}
    for device, hidden in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        printed = subprocess.check_output([sys.executable, __file__, precision], env=os.environ | rank | hidden)
        seen[device] = json.loads(printed.splitlines()[-1])
    assert len(seen["gpu"]) == 20
    got = differences(seen["gpu"], seen["cpu"])
    assert got[0] < loss and got[1] < grad_norm


if __name__ == "__main__":
    print(json.dumps(losses(sys.argv[1])))
