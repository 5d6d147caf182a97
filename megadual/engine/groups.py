"""The process groups of a run's layout; both engines use megatron-core's."""

import math

from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megadual.run.watchdog import collective_timeout_s
from megadual.train.config import PretrainConfig


def initialize_groups(run: PretrainConfig) -> None:
    """Create the groups over the initialised default group, and seed the generators of each."""
    virtual = run.parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=run.parallel.tensor,
        pipeline_model_parallel_size=run.parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=run.parallel.context,
        distributed_timeout_minutes=math.ceil(collective_timeout_s(run.run.hang_timeout) / 60),
    )
    model_parallel_cuda_manual_seed(run.train.seed)


def destroy_groups() -> None:
    parallel_state.destroy_model_parallel()
