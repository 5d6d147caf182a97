"""The megatron engine: tensor, pipeline and data parallel training on megatron-core's own schedules."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megadual.data.dataset import MicroBatch
from megadual.engine import megatron_internals, sharded
from megadual.engine.groups import destroy_groups, initialize_groups
from megadual.engine.muon import Muon
from megadual.engine.run_ahead import RunAhead
from megadual.engine.saved_state import MUON_STATE, SavedState, data_parallel_group
from megadual.engine.schedule import schedule
from megadual.engine.step import GlobalLosses, StepResult
from megadual.engine.topology import Topology
from megadual.model import fp8
from megadual.model.context import context_share
from megadual.model.dual_lm import DualLM, StreamLosses, Vocabulary
from megadual.model.freezing import train_only
from megadual.model.init import initialize
from megadual.model.matrices import hidden_matrices
from megadual.run.watchdog import collective_timeout_s
from megadual.train.config import PretrainConfig


def build_chunks(run: PretrainConfig, vocabulary: Vocabulary) -> list[DualLM]:
    """This rank's model chunks (one, or one per virtual pipeline stage), from the run's seed or `checkpoint.start`."""
    virtual = run.parallel.virtual_pipeline
    chunks = []
    for chunk in range(virtual):
        vp_stage = chunk if virtual > 1 else None
        chunks.append(
            DualLM(
                run,
                vocabulary,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=virtual == 1, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=virtual == 1, vp_stage=vp_stage),
                vp_stage=vp_stage,
            )
        )
    initialize(chunks, run.train.seed)
    if run.checkpoint.start:
        sharded.load_weights(chunks, Path(run.checkpoint.start))
    return chunks


class MegatronEngine(SavedState):
    """Owns the model chunks, the optimizer and the schedule; `train_step` runs one global batch."""

    def __init__(self, run: PretrainConfig, topology: Topology, vocabulary: Vocabulary):
        if run.train.fp8:
            fp8.check_device()
        initialize_groups(run)
        self.run, self.topology, self.vocabulary = run, topology, vocabulary
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.chunks = build_chunks(run, vocabulary)
        for chunk in self.chunks:
            train_only(chunk, run.train.parts)
        # After an update each data-parallel rank has its share of the weights alone; they are gathered beside the next
        # step's forward. All at once, unless the GPU has one queue (engine/environment.py), where what comes after
        # would wait for the last of them to begin.
        self.gathers, self.gathers_all = data_parallel_group().size() > 1, run.parallel.tensor == 1
        megatron_internals.reduce_in_bf16()
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=self.gathers or torch.cuda.is_available(),
            overlap_param_gather=self.gathers,
            align_param_gather=self.gathers_all,  # modules wait for their weights, but don't begin the next ones'
            grad_reduce_in_fp32=True,
            reduce_scatter_with_fp32_accumulation=self.gathers and run.train.grad_reduce_dtype == "bf16",
        )
        self.model = [
            DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(self.chunks)
        ]
        for wrapped in self.model:
            megatron_internals.sum_gradients(wrapped)
            if self.gathers:
                megatron_internals.wait_for_weights(wrapped)
        for chunk in self.chunks:
            megatron_internals.add_in_products(chunk)
        self.fp8 = megatron_internals.multiply_in_fp8(self.chunks) if run.train.fp8 else []
        megatron_internals.clip_in_place()
        train = run.train
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=train.lr,
                min_lr=train.min_lr,
                weight_decay=train.weight_decay,
                adam_beta1=train.beta1,
                adam_beta2=train.beta2,
                clip_grad=train.clip_grad,
                bf16=train.precision == "bf16",
                params_dtype=self.chunks[0].config.params_dtype,
                use_distributed_optimizer=True,
            ),
            self.model,
        )
        self._describe()
        megatron_internals.check(self.optimizer if self._inner_optimizer() else None)
        self.by_muon: set[torch.nn.Parameter] = set()
        if self._inner_optimizer():
            if train.optimizer == "muon":
                self._use_muon()
            for group in self._inner_optimizer().param_groups if sharded.is_torchs(self._inner_optimizer()) else ():
                group["fused"] = torch.cuda.is_available()  # one pass over weights, gradients and moments
            sharded.hold_moments(
                self._inner_optimizer(), [p for group in self._inner_optimizer().param_groups for p in group["params"]]
            )
        self.scheduler = schedule(run, self.optimizer)
        no_sync = [wrapped.no_sync for wrapped in self.model] if ddp.overlap_grad_reduce else [None]
        self.no_sync = no_sync if len(no_sync) > 1 else no_sync[0]
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self.optimizer.scale_loss
        self.forward_backward = get_forward_backward_func()
        self.run_ahead = None
        if run.parallel.run_ahead and run.parallel.pipeline > 1:
            self.run_ahead = RunAhead(collective_timeout_s(run.run.hang_timeout))

    def _use_muon(self) -> None:
        """Put Muon in AdamW's place."""
        matrices = [matrix for chunk in self.chunks for matrix in hidden_matrices(chunk, self.run.model)]
        self.by_muon = {matrix.parameter for matrix in matrices}
        shares = [megatron_internals.held(self.optimizer, matrix.parameter) for matrix in matrices]
        muon = Muon(
            megatron_internals.adamw(self.optimizer).param_groups,
            matrices,
            [share and (share[0], share[1]["param"]) for share in shares],
            self.run.train.momentum,
            self.chunks[0].config.params_dtype,
        )
        sharded.hold_moments(muon, muon.mains, sharded.MOMENTUM)
        megatron_internals.replace_adamw(self.optimizer, muon)

    def train_step(self, batches: list[MicroBatch], approve: Callable[[StepResult], bool] | None = None) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Where `approve` says no to the step's losses and gradient norm, weights and optimizer stay as they were; the
        schedule goes on.
        """
        losses = GlobalLosses(self.run, batches, self.vocabulary)
        for wrapped in self.model if self.gathers else ():
            # Not sooner: exchanges go one by one, and the host waits for those of losses and counts.
            megatron_internals.begin_gathering(wrapped, self.gathers_all)
        for wrapped in self.model:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run_chunks(batches, losses)
        lr = self.scheduler.get_lr({})
        if approve:
            self.optimizer.prepare_grads()
            result = losses.result(self.optimizer.get_grad_norm(), lr)
            if approve(result):
                self.optimizer.step()
        else:
            _, grad_norm, _ = self.optimizer.step()
            result = losses.result(grad_norm, lr)
        self.scheduler.step(increment=1)
        return result

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch]) -> dict[str, float]:
        """Mean losses by name over all ranks' micro-batches, as the weights are."""
        self.gather_weights()
        losses = GlobalLosses(self.run, batches, self.vocabulary)
        for wrapped in self.model:
            wrapped.eval()
        self._run_chunks(batches, losses, forward_only=True)
        for wrapped in self.model:
            wrapped.train()
        return losses.means()[0]

    def save(self, folder: Path) -> sharded.ShardedWrite:
        self.gather_weights()
        return super().save(folder)

    def gather_weights(self) -> None:
        """Make the weights whole on every rank (collective): after a step each has the new ones of its share alone."""
        for wrapped in self.model if self.gathers else ():
            megatron_internals.gather_now(wrapped)

    def _run_chunks(self, batches: list[MicroBatch], losses: GlobalLosses, forward_only: bool = False) -> None:
        """All micro-batches through all chunks of all stages, and back; their losses go to `losses`."""
        if self.fp8:
            self.gather_weights()
        fp8.update(self.fp8, parallel_state.get_tensor_model_parallel_group())
        positions = batches[0].tokens.size(0)
        context = parallel_state.get_context_parallel_rank(), self.run.parallel.context
        batches = [context_share(batch, *context).to(torch.cuda.current_device()) for batch in batches]
        if self.run_ahead and not forward_only:
            split = context[1] * (self.run.parallel.tensor if self.run.parallel.sequence else 1)
            shape = positions // split, 1, self.run.model.hidden
            self.run_ahead.run(self.model[0], batches, losses.total, shape)
            finalize_model_grads(self.model)
            return
        # megatron divides by the micro-batches and multiplies by context-parallel ranks; the loss is global already.
        scale = len(batches) / context[1]

        for chunk in self.chunks:
            # A pipeline's schedule that goes forward only enters this and does not leave it.
            chunk.config.no_sync_func = None if forward_only else self.no_sync

        def loss_func(output: StreamLosses):
            return losses.total(output) * scale, {}

        def forward_step(iterator, model):
            return model(next(iterator)), loss_func

        self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.model] if len(self.model) > 1 else iter(batches),
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(batches),
            seq_length=positions,  # before it is cut over context- and tensor-parallel ranks
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _inner_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer inside megatron's, None on a rank where nothing is trained."""
        trained = any(parameter.requires_grad for chunk in self.chunks for parameter in chunk.parameters())
        return megatron_internals.adamw(self.optimizer) if trained else None

    def _state(self, parameter: torch.nn.Parameter) -> dict[str, str]:
        return MUON_STATE if parameter in self.by_muon else super()._state(parameter)

    def _whole(self, parameter: torch.nn.Parameter, owner: int) -> Iterator[tuple[str, torch.Tensor | None]]:
        group = data_parallel_group()
        mine = owner == dist.get_rank(group)
        yield "", parameter.detach() if mine else None
        for prefix, key in self._state(parameter).items():
            whole = torch.zeros(parameter.numel(), device=parameter.device)
            if share := megatron_internals.held(self.optimizer, parameter):
                place, state = share
                whole[place] = state[key]
            # Each number is on one rank, the others add zero bits: exact, minus zeros and NaNs too.
            dist.reduce(whole.view(torch.int32), dist.get_global_rank(group, owner), group=group)
            yield prefix, whole.view(parameter.shape) if mine else None

    def _fill(self, parameter: torch.nn.Parameter, prefix: str, tensor: torch.Tensor) -> None:
        if not prefix:
            parameter.copy_(tensor)
        elif share := megatron_internals.held(self.optimizer, parameter):
            place, state = share
            state[self._state(parameter)[prefix]].copy_(tensor.flatten()[place])

    def shutdown(self) -> None:
        if self.run_ahead:
            self.run_ahead.close()
        destroy_groups()
