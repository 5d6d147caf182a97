"""What CUDA reads from the environment, once, when it starts: so this is called before torch is imported."""

import os
from pathlib import Path

from megadual.train.config import PretrainConfig


def set_environment(run: PretrainConfig) -> None:
    """Choose what the run's device and layout ask for; what the user has set stays."""
    run.run.use_device()
    # flash-attn-4 compiles its kernels for 20 seconds, and keeps them for the next start where it is asked to.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(Path.home() / ".cache/megadual/flash-attn"))
    if run.parallel.tensor > 1:
        # One queue keeps communication in front of the products that it is to overlap with, which would else fill the
        # GPU first (megatron-core asks for it).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
