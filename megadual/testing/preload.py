"""What the forkserver imports once for all test processes."""

from megadual.engine import cpu

cpu.install()

import megatron.core.distributed  # noqa: E402, F401
import megatron.core.optimizer  # noqa: E402, F401
import megatron.core.pipeline_parallel  # noqa: E402, F401
