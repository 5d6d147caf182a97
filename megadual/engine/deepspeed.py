"""The deepspeed engine: tensor parallelism with ZeRO-1/2/3, or with pipeline stages and ZeRO-1.

The model is the one that the megatron engine runs; a pipeline stage is one chunk of it, as one layer of
DeepSpeed's PipelineModule. Process groups are megatron-core's, which DeepSpeed's order of ranks agrees with.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from pydantic import ValidationError

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from megadual.data.dataset import MicroBatch
from megadual.engine import deepspeed_internals, megatron_internals, sharded
from megadual.engine.groups import destroy_groups, initialize_groups
from megadual.engine.saved_state import SavedState
from megadual.engine.schedule import schedule
from megadual.engine.step import GlobalLosses, StepResult
from megadual.engine.topology import Topology
from megadual.errors import UserError
from megadual.model.dual_lm import DualLM, StreamLosses, Vocabulary
from megadual.model.freezing import train_only
from megadual.model.init import initialize
from megadual.train.config import ParallelConfig, PretrainConfig


class ModelParallelUnit:
    """What DeepSpeed asks of an `mpu`, answered by megatron-core; its "model parallel" is tensor parallel here."""

    def __getattr__(self, name):
        return getattr(parallel_state, name)

    def get_model_parallel_group(self):
        return parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_world_size(self):
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_rank(self):
        return parallel_state.get_tensor_model_parallel_rank()


class Feed:
    """This rank's micro-batches of one step, in order; every stage reads the data itself."""

    def start(self, batches: list[MicroBatch], losses: GlobalLosses, scale: float) -> None:
        self.batches, self.losses, self.scale = iter(batches), losses, scale

    def next(self) -> MicroBatch:
        return next(self.batches)

    def loss(self, output: StreamLosses) -> torch.Tensor:
        return self.losses.total(output) * self.scale


class Stage(torch.nn.Module):
    """This rank's pipeline stage (or the whole model): a chunk, fed a micro-batch at each forward pass.

    The last stage returns the loss: parameters that a loss function outside of the layers uses would get no
    gradient in bf16.
    """

    def __init__(self, run: PretrainConfig, vocabulary: Vocabulary, feed: Feed):
        super().__init__()
        self.feed = feed
        self.chunk = chunk = DualLM(
            run,
            vocabulary,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        initialize([chunk], run.train.seed)
        if run.checkpoint.start:
            sharded.load_weights([chunk], Path(run.checkpoint.start))
        train_only(chunk, run.train.parts)
        for parameter in chunk.parameters():
            if parameter.requires_grad and getattr(parameter, "sequence_parallel", False):
                _sum_over_tensor_parallel(parameter)
        if run.parallel.zero_stage == 3:
            # Read outside of its own layer, and once more when the loss's chunks are made again in backward.
            deepspeed.zero.register_external_parameter(self, chunk.output_weight())

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        if not self.chunk.pre_process:
            self.chunk.set_input_tensor(received)
        output = self.chunk(self.feed.next())
        return self.feed.loss(output) if self.chunk.post_process else output


def _settings(run: PretrainConfig, topology: Topology) -> dict:
    return {
        "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
        "gradient_accumulation_steps": topology.microbatches,
        "gradient_clipping": run.train.clip_grad,
        "zero_optimization": _zero_settings(run.parallel),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Gradients go to their fp32 sums as soon as they are made, and are not kept in bf16 besides.
        "bf16": {"enabled": run.train.precision == "bf16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        # Partitioned activations would be wrong under sequence parallelism, where they are partitioned already.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 1 << 62,
    }


def _zero_settings(parallel: ParallelConfig) -> dict:
    settings = {"stage": parallel.zero_stage, **{name: int(value) for name, value in parallel.zero.items()}}
    try:
        DeepSpeedZeroConfig(**settings)
    except ValidationError as error:
        problem, *_ = error.errors()
        raise UserError(f"parallel.zero.{problem['loc'][0]}: DeepSpeed says: {problem['msg']}") from error
    return settings


def _parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Biases and norms are not decayed, as in megatron-core."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if name.endswith(".bias") or p.dim() == 1]
    decayed = [p for name, p in named if not (name.endswith(".bias") or p.dim() == 1)]
    return [
        {"params": decayed, "weight_decay": weight_decay, "wd_mult": 1.0},
        {"params": plain, "weight_decay": 0.0, "wd_mult": 0.0},
    ]


def _sum_over_tensor_parallel(parameter: torch.nn.Parameter) -> None:
    def reduce(gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        return gradient

    parameter.register_hook(reduce)


class DeepSpeedEngine(SavedState):
    """The same interface as MegatronEngine, on DeepSpeed."""

    def __init__(self, run: PretrainConfig, topology: Topology, vocabulary: Vocabulary):
        megatron_internals.check()  # its checkpoints are megatron-core's
        deepspeed_internals.without_compiling()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        initialize_groups(run)
        self.run, self.topology, self.vocabulary = run, topology, vocabulary
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.feed = Feed()
        pipelined = run.parallel.pipeline > 1

        if pipelined:
            with contextlib.redirect_stdout(None):  # it prints its layers
                module = PipelineModule(
                    [LayerSpec(Stage, run, vocabulary, self.feed) for _ in range(run.parallel.pipeline)],
                    topology=PipeModelDataParallelTopology(run.parallel.pipeline, run.parallel.tensor, topology.data),
                    partition_method="uniform",
                )
            self.chunks = [deepspeed_internals.own_stage(module).chunk]
        else:
            module = Stage(run, vocabulary, self.feed)
            self.chunks = [module.chunk]
        self._describe()
        train = run.train
        optimizer = torch.optim.AdamW(
            _parameter_groups(module, train.weight_decay), lr=train.lr, betas=(train.beta1, train.beta2), eps=1e-8
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=_settings(run, topology),
            mpu=None if pipelined else ModelParallelUnit(),
            dist_init_required=False,
        )
        if deepspeed_internals.show_main_grads(self.engine):
            for chunk in self.chunks:
                megatron_internals.add_in_products(chunk)
        self._hold_moments()
        self.scheduler = schedule(run, self.optimizer)

    def train_step(self, batches: list[MicroBatch], approve: Callable[[StepResult], bool] | None = None) -> StepResult:
        """One optimizer step over this rank's micro-batches. A step can't be refused: `approve` must be None."""
        assert approve is None
        losses, nothing = self._feed(batches), self._nothing()
        lr = self.optimizer.param_groups[0]["lr"]
        if self.run.parallel.pipeline > 1:
            self.engine.train_batch(iter([(nothing, nothing)] * len(batches)))
        else:
            for _ in batches:
                self.engine.backward(self.engine(nothing))
                self.engine.step()
        self.scheduler.step(increment=1)
        return losses.result(self.engine.get_global_grad_norm(), lr)

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch]) -> dict[str, float]:
        """Mean losses by name over all ranks' micro-batches, as the weights are."""
        losses, nothing = self._feed(batches), self._nothing()
        self.engine.eval()
        if self.run.parallel.pipeline > 1:
            fed = iter([(nothing, nothing)] * len(batches))
            self.engine.eval_batch(fed, bcast_loss=False, num_micro_batches=len(batches))
        else:
            for _ in batches:
                self.engine(nothing)
        self.engine.train()
        return losses.means()[0]

    def _feed(self, batches: list[MicroBatch]) -> GlobalLosses:
        """Make this rank's micro-batches what the stages read next; returns where their losses go."""
        batches = [batch.to(torch.cuda.current_device()) for batch in batches]
        losses = GlobalLosses(self.run, batches, self.vocabulary)
        # DeepSpeed divides by the micro-batches and averages over data-parallel ranks; the loss is global already.
        self.feed.start(batches, losses, scale=len(batches) * self.topology.data)
        return losses

    @staticmethod
    def _nothing() -> torch.Tensor:
        """What DeepSpeed hands a first stage, which reads the feed."""
        return torch.zeros(1, device=torch.cuda.current_device())

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return deepspeed_internals.adamw(self.engine)

    def _whole(self, parameter: torch.nn.Parameter, owner: int) -> Iterator[tuple[str, torch.Tensor | None]]:
        mine = owner == self.data_rank
        with self._gathered(parameter):
            yield "", parameter.detach() if mine else None
        for prefix, key in self._state(parameter).items():
            if key == "param":
                tensor = safe_get_full_fp32_param(parameter)
            else:
                tensor = safe_get_full_optimizer_state(parameter, key)
            yield prefix, tensor if mine else None

    def _fill(self, parameter: torch.nn.Parameter, prefix: str, tensor: torch.Tensor) -> None:
        tensor = tensor.to(parameter.device)
        if not prefix:
            with self._gathered(parameter, modifier_rank=0):
                parameter.copy_(tensor)
        elif (key := self._state(parameter)[prefix]) == "param":
            safe_set_full_fp32_param(parameter, tensor)
        else:
            safe_set_full_optimizer_state(parameter, tensor, key)

    def _hold_moments(self) -> None:
        """Give AdamW its state before the first step, and DeepSpeed's parameters their views of it."""
        stage = self.run.parallel.zero_stage
        sharded.hold_moments(self._inner_optimizer(), deepspeed_internals.flat_weights(self.engine, stage))
        deepspeed_internals.show_moments(self.engine, stage)

    def _gathered(self, parameter: torch.nn.Parameter, modifier_rank: int | None = None):
        """ZeRO-3 keeps a part of every parameter on each rank; within this context it is whole."""
        if self.run.parallel.zero_stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)

    def shutdown(self) -> None:
        self.engine.destroy()
        destroy_groups()
