"""Settings shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from megadual.engine import cpu  # noqa: E402

cpu.install()


def pytest_ignore_collect(collection_path, config):
    """tests/slurm starts a cluster as root: it runs only where it is asked for (`make test-slurm`)."""
    if collection_path.name == "slurm" and not any("slurm" in argument for argument in config.args):
        return True
