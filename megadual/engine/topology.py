"""How a run's sizes divide the world: the data-parallel size, rows per step, and what can't work."""

import dataclasses

from megadual.errors import UserError
from megadual.train.config import PretrainConfig

FP8_MULTIPLE = 16  # of which the sizes of products of FP8 must be


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
        if run.engine == "deepspeed":
            parts.append(f"zero={parallel.zero_stage}")
        if parallel.virtual_pipeline > 1:
            parts.append(f"virtual_pipeline={parallel.virtual_pipeline}")
        if parallel.context > 1:
            parts.append(f"context={parallel.context}")
        if parallel.sequence:
            parts.append("sequence")
        return " ".join([*parts, f"data={self.data}"])


def topology(run: PretrainConfig, world: int) -> Topology:
    """Check that the run's layout divides; UserError shows the product that does not."""
    parallel, model, train = run.parallel, run.model, run.train
    if not run.data.sets:
        raise UserError("data.sets=[] names no shard set; make one with data_pipeline/tokenize.py")
    _check_engine(run)

    inner = parallel.tensor * parallel.pipeline * parallel.context
    if world % inner:
        context = f" x parallel.context({parallel.context})" if parallel.context > 1 else ""
        raise UserError(
            f"parallel.tensor({parallel.tensor}) x parallel.pipeline({parallel.pipeline}){context} = {inner} "
            f"does not divide the world of {world} processes"
        )
    data = world // inner
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise UserError(f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline > 1")
    if model.layers < chunks - 1:
        raise UserError(
            f"model.layers={model.layers} are too few for parallel.pipeline({parallel.pipeline}) x "
            f"parallel.virtual_pipeline({parallel.virtual_pipeline}) = {chunks} chunks"
        )
    split = parallel.stage_layers
    if split is not None and (len(split) != chunks or sum(split) != model.layers or min(split) < 0):
        raise UserError(
            f"parallel.stage_layers={split} must be {chunks} numbers that add up to model.layers={model.layers}"
        )
    if model.heads % parallel.tensor:
        raise UserError(f"model.heads={model.heads} does not divide by parallel.tensor={parallel.tensor}")
    if model.kv_heads % parallel.tensor and parallel.tensor % model.kv_heads:
        raise UserError(
            f"model.kv_heads={model.kv_heads} and parallel.tensor={parallel.tensor}: one must divide the other"
        )
    if model.ffn % parallel.tensor:
        raise UserError(f"model.ffn={model.ffn} does not divide by parallel.tensor={parallel.tensor}")
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence=true needs parallel.tensor > 1")
    positions = train.seq_len * train.micro_batch_size
    shares = parallel.tensor if parallel.sequence else 1
    if parallel.context > 1:
        shares *= 2 * parallel.context  # each rank takes an early and a late part
    if positions % shares:
        raise UserError(
            f"train.seq_len({train.seq_len}) x train.micro_batch_size({train.micro_batch_size}) = {positions} does not "
            f"divide into the {shares} equal shares that parallel.context={parallel.context} and "
            f"parallel.sequence={str(parallel.sequence).lower()} at parallel.tensor={parallel.tensor} take"
        )
    if train.fp8:
        _check_fp8(run, positions // parallel.context)

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
    if run.data.validation:
        _check_validation(run, data)
    return Topology(world, data, train.global_batch_tokens // train.seq_len, microbatches)


def _check_fp8(run: PretrainConfig, positions: int) -> None:
    """Products of FP8 take sizes of a multiple alone; `positions` are those of a context-parallel rank."""
    model, tensor = run.model, run.parallel.tensor
    heads = model.heads // tensor + 2 * max(model.kv_heads // tensor, 1)
    sizes = {
        "positions of a micro-batch on a rank": positions,
        "model.hidden": model.hidden,
        "model.hidden / parallel.tensor": model.hidden // tensor,
        "model.ffn / parallel.tensor": model.ffn // tensor,
        "width of a rank's queries, keys and values": heads * (model.hidden // model.heads),
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise UserError(f"train.fp8=true takes sizes that are multiples of {FP8_MULTIPLE}; {name}: {size}")


def _check_validation(run: PretrainConfig, data: int) -> None:
    """All ranks have equally many micro-batches of held-out rows."""
    rows, size, virtual = run.data.validation_rows, run.train.micro_batch_size, run.parallel.virtual_pipeline > 1
    shares = size * data * (run.parallel.pipeline if virtual else 1)
    if rows % shares:
        stages = f" x parallel.pipeline({run.parallel.pipeline}), for the virtual pipeline," if virtual else ""
        raise UserError(
            f"data.validation_rows={rows} is not a multiple of train.micro_batch_size({size}) x "
            f"data-parallel({data}){stages} = {shares}"
        )


def _check_engine(run: PretrainConfig) -> None:
    parallel, stage, trained = run.parallel, run.parallel.zero_stage, set(run.train.parts)
    if run.engine == "megatron" and stage != 1:
        raise UserError(
            f"parallel.zero_stage={stage} needs engine=deepspeed; megatron's distributed optimizer is stage 1"
        )
    if run.engine == "deepspeed" and run.train.bad_loss == "skip":
        raise UserError(
            "train.bad_loss=skip needs engine=megatron: DeepSpeed updates the weights within the backward pass's last "
            "call, when the loss of all ranks is not known yet"
        )
    if run.engine == "deepspeed" and run.train.optimizer == "muon":
        raise UserError(
            "train.optimizer=muon needs engine=megatron: DeepSpeed hands an optimizer flat pieces of all parameters "
            "together, of which no matrix can be told"
        )
    if run.engine == "deepspeed" and run.train.fp8:
        raise UserError("train.fp8=true needs engine=megatron: DeepSpeed's layers are of another kind")
    if run.engine == "deepspeed" and run.train.grad_reduce_dtype != "fp32":
        raise UserError(
            f"train.grad_reduce_dtype={run.train.grad_reduce_dtype} needs engine=megatron: DeepSpeed exchanges "
            "gradients in the run's precision"
        )
    if stage == 3 and run.train.drawn_at_once is not None:
        raise UserError(
            f"train.drawn_at_once={run.train.drawn_at_once} does not go with parallel.zero_stage=3, whose ranks gather "
            "weights together: those that draw more would run the visual heads more often"
        )
    if parallel.zero and (run.engine == "megatron" or "stage" in parallel.zero):
        raise UserError(
            f"parallel.zero={parallel.zero} are settings of DeepSpeed's: they need engine=deepspeed, and the stage is "
            "parallel.zero_stage"
        )
    if parallel.run_ahead and (run.engine == "deepspeed" or parallel.virtual_pipeline > 1):
        raise UserError(
            "parallel.run_ahead=1 needs engine=megatron and parallel.virtual_pipeline=1, whose schedule it replaces"
        )
    if run.engine == "deepspeed" and parallel.virtual_pipeline > 1:
        raise UserError(f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs engine=megatron")
    if run.engine == "deepspeed" and parallel.context > 1:
        raise UserError(
            f"parallel.context={parallel.context} needs engine=megatron: DeepSpeed's data-parallel group would have to "
            "hold the context-parallel ranks for gradients but not for data"
        )
    on_every_stage = "llm" in trained or parallel.pipeline == 2 and trained == {"projector", "heads"}
    if run.engine == "deepspeed" and parallel.pipeline > 1 and not on_every_stage:
        raise UserError(
            f"train.parts={run.train.parts} leave a stage of parallel.pipeline={parallel.pipeline} with nothing to "
            "train, which DeepSpeed does not allow; use engine=megatron, or parallel.pipeline=1"
        )
    if stage > 1 and parallel.pipeline > 1:
        raise UserError(
            f"parallel.zero_stage={stage} does not go with parallel.pipeline={parallel.pipeline}: a stage sums the "
            "gradients of its micro-batches, which ZeRO-2 and 3 split up after each; use parallel.zero_stage=1"
        )
    if run.engine == "deepspeed" and parallel.pipeline > 1 and run.model.tie_embeddings:
        raise UserError(
            "model.tie_embeddings=true does not go with a DeepSpeed pipeline, which counts the shared table twice in "
            "the gradient norm; use engine=megatron, or parallel.pipeline=1"
        )
