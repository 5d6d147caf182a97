"""What CUDA reads from the environment, once, when it starts: so this is called before torch is imported."""

import os

from megadual.train.config import PretrainConfig


def set_environment(run: PretrainConfig) -> None:
    """Choose what the run's device and layout ask for; what the user has set stays."""
    run.run.use_device()
    if run.parallel.tensor > 1:
        # One queue keeps communication in front of the products that it is to overlap with, which would else fill the
        # GPU first (megatron-core asks for it).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
