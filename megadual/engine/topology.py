"""How a run's sizes divide the world: the data-parallel size, rows per step, and what can't work."""

import dataclasses

from megadual.config import PretrainConfig
from megadual.errors import UserError


@dataclasses.dataclass(frozen=True)
class Topology:
    """Derived sizes of a run's layout."""

    world: int
    data: int  # data-parallel ranks
    rows_per_step: int  # packed rows of seq_len positions in a global batch
    microbatches: int  # per data-parallel rank and step

    def describe(self, run: PretrainConfig) -> str:
        parallel = run.parallel
        parts = [f"tensor={parallel.tensor}", f"pipeline={parallel.pipeline}"]
        if parallel.virtual_pipeline > 1:
            parts.append(f"virtual_pipeline={parallel.virtual_pipeline}")
        if parallel.sequence:
            parts.append("sequence")
        return " ".join([*parts, f"data={self.data}"])


def topology(run: PretrainConfig, world: int) -> Topology:
    """Check that the run's layout divides; UserError shows the product that does not. `run.model` is resolved."""
    parallel, model, train = run.parallel, run.model, run.train
    if run.engine != "megatron":
        raise UserError(f"engine '{run.engine}' is unknown; known: megatron")
    if train.precision not in ("fp32", "bf16"):
        raise UserError(f"train.precision '{train.precision}' is unknown; known: fp32, bf16")
    for name in ("tensor", "pipeline", "virtual_pipeline"):
        if getattr(parallel, name) < 1:
            raise UserError(f"parallel.{name}={getattr(parallel, name)} must be at least 1")

    inner = parallel.tensor * parallel.pipeline
    if world % inner:
        raise UserError(
            f"parallel.tensor({parallel.tensor}) x parallel.pipeline({parallel.pipeline}) = {inner} "
            f"does not divide the world of {world} processes"
        )
    data = world // inner
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise UserError(f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline > 1")
    if model.layers % chunks:
        raise UserError(
            f"model.layers={model.layers} does not divide by parallel.pipeline({parallel.pipeline}) x "
            f"parallel.virtual_pipeline({parallel.virtual_pipeline}) = {chunks}"
        )
    if model.heads % parallel.tensor:
        raise UserError(f"model.heads={model.heads} does not divide by parallel.tensor={parallel.tensor}")
    if model.kv_heads % parallel.tensor and parallel.tensor % model.kv_heads:
        raise UserError(f"model.kv_heads={model.kv_heads} and parallel.tensor={parallel.tensor}: one must divide the other")
    if model.ffn % parallel.tensor:
        raise UserError(f"model.ffn={model.ffn} does not divide by parallel.tensor={parallel.tensor}")
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence=true needs parallel.tensor > 1")
    if parallel.sequence and (train.seq_len * train.micro_batch_size) % parallel.tensor:
        raise UserError(
            f"parallel.sequence: train.seq_len({train.seq_len}) x train.micro_batch_size({train.micro_batch_size}) "
            f"does not divide by parallel.tensor={parallel.tensor}"
        )

    per_microbatch = train.seq_len * train.micro_batch_size * data
    if train.global_batch_tokens % per_microbatch:
        raise UserError(
            f"train.global_batch_tokens={train.global_batch_tokens} is not a multiple of train.seq_len({train.seq_len})"
            f" x train.micro_batch_size({train.micro_batch_size}) x data-parallel({data}) = {per_microbatch}"
        )
    microbatches = train.global_batch_tokens // per_microbatch
    if parallel.virtual_pipeline > 1 and microbatches % parallel.pipeline:
        raise UserError(
            f"a virtual pipeline needs a multiple of parallel.pipeline={parallel.pipeline} micro-batches a step; "
            f"train.global_batch_tokens={train.global_batch_tokens} gives {microbatches}"
        )
    return Topology(world, data, train.global_batch_tokens // train.seq_len, microbatches)
