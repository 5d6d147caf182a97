"""What CUDA reads from the environment, once, when it starts: so this is called before torch is imported."""

import os

from megadual.config import PretrainConfig


def set_environment(run: PretrainConfig) -> None:
    """Choose what the run's device and layout ask for; what the user has set stays."""
    if run.run.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if run.parallel.tensor > 1:
        # One queue keeps communication in front of the products that it is to overlap with, which would else fill the
        # GPU first (megatron-core asks for it).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
