"""The deepspeed engine: tensor parallelism with ZeRO-1/2/3, or with pipeline stages and ZeRO-1.

The model is the one that the megatron engine runs; a pipeline stage is one chunk of it, as one layer of
DeepSpeed's PipelineModule. Process groups are megatron-core's, which DeepSpeed's order of ranks agrees with.
"""

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from megadual.config import PretrainConfig
from megadual.data.dataset import MicroBatch
from megadual.engine.groups import destroy_groups, initialize_groups
from megadual.engine.step import GlobalLosses, StepResult, schedule
from megadual.engine.topology import Topology
from megadual.model.dual_lm import DualLM, StreamLosses, Vocabulary
from megadual.model.init import initialize
from megadual.model.parts import train_only


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
        train_only(chunk, run.train.parts)
        _hide_extra_state(chunk)
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
        "zero_optimization": {"stage": run.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": run.train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        # Partitioned activations would be wrong under sequence parallelism, where they are partitioned already.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 1 << 62,
    }


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


def _hide_extra_state(module: torch.nn.Module) -> None:
    """megatron-core's linear layers put `_extra_state: None` into state dicts, which DeepSpeed's files can't hold."""

    def drop(_module, state, _prefix, _metadata):
        for name in [name for name in state if name.endswith("_extra_state") and state[name] is None]:
            del state[name]

    def restore(_module, state, prefix, *_):
        for name, part in module.named_modules():
            key = f"{prefix}{name}._extra_state"
            if key not in state and type(part).get_extra_state is not torch.nn.Module.get_extra_state:
                state[key] = None

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_pre_hook(restore)


class DeepSpeedEngine:
    """The same interface as MegatronEngine, on DeepSpeed."""

    def __init__(self, run: PretrainConfig, topology: Topology, vocabulary: Vocabulary):
        __compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at run time; gloo does
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
            self.chunks = [module.forward_funcs[0].chunk]
        else:
            module = Stage(run, vocabulary, self.feed)
            self.chunks = [module.chunk]
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
        self.scheduler = schedule(run, self.optimizer)

    def train_step(self, batches: list[MicroBatch]) -> StepResult:
        """One optimizer step over this rank's micro-batches."""
        device = torch.cuda.current_device()
        batches = [batch.to(device) for batch in batches]
        losses = GlobalLosses(self.run, batches, self.vocabulary)
        # DeepSpeed divides by the micro-batches and averages over data-parallel ranks; the loss is global already.
        self.feed.start(batches, losses, scale=len(batches) * self.topology.data)
        lr = self.optimizer.param_groups[0]["lr"]
        nothing = torch.zeros(1, device=device)
        if self.run.parallel.pipeline > 1:
            self.engine.train_batch(iter([(nothing, nothing)] * len(batches)))
        else:
            for _ in batches:
                self.engine.backward(self.engine(nothing))
                self.engine.step()
        self.scheduler.step(increment=1)
        return losses.result(self.engine.get_global_grad_norm(), lr)

    def save(self, folder: Path) -> None:
        """The weights as torch_dist shards, as the megatron engine writes them; the rest as DeepSpeed's files."""
        self.engine.save_checkpoint(
            str(folder / "deepspeed"), tag="state", client_state={"scheduler": self.scheduler.state_dict()}
        )
        with self._whole_parameters():
            model = self.chunks[0].sharded_state_dict(metadata={"non_homogeneous_layers": True})
            dist_checkpointing.save({"model": model}, str(folder), sharded_strategy=("torch_dist", 1))

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote under the same layout."""
        _, state = self.engine.load_checkpoint(str(folder / "deepspeed"), tag="state")
        self.scheduler.load_state_dict(state["scheduler"])

    def _whole_parameters(self):
        """ZeRO-3 keeps a part of every parameter on each rank; within this context all are whole."""
        if self.run.parallel.zero_stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(list(self.chunks[0].parameters()))

    def shutdown(self) -> None:
        self.engine.destroy()
        destroy_groups()
