"""What the forkserver imports once for all test processes: for a rank it costs more than the steps that it trains."""

import gc

from megadual.engine import cpu

cpu.install()

import megatron.core.pipeline_parallel  # noqa: E402, F401

import megadual.engine.deepspeed  # noqa: E402, F401
import megadual.engine.megatron  # noqa: E402, F401
import megadual.run.session  # noqa: E402, F401
import megadual.testing.checkpoints  # noqa: E402, F401
import megadual.train.loop  # noqa: E402, F401
import megadual.train.setup  # noqa: E402, F401
import megadual.vision.train  # noqa: E402, F401

gc.collect()
gc.freeze()  # what a fork need not look through, and so not copy, for whatever it collects itself
