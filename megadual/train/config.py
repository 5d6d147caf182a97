"""What `pretrain/pretrain.py` takes."""

import dataclasses
import os

from megadual.errors import UserError
from megadual.keys import key
from megadual.model.config import ModelConfig
from megadual.model.freezing import PARTS
from megadual.run import config as shared


@dataclasses.dataclass
class DataConfig:
    sets: list[str] = key(about="shard sets made by data_pipeline/tokenize.py")
    weights: list[float] | None = key(None, "share of each set in the rows; null: by their positions", least=0)
    draw_probability: float = key(
        0.5, "share of images that are to be drawn; the others are looked at", least=0, most=1
    )
    caption_dropout: float = key(
        0.1, "share of drawn pairs whose caption is left out, for classifier-free guidance", least=0, most=1
    )
    validation: list[str] = key([], "shard sets that are held out, whose mean losses are logged as val_loss")
    validation_every: int | None = key(None, "steps between them; the last step has them too; null: it alone", least=1)
    validation_rows: int = key(256, "packed rows of them, the same ones each time; fewer are read again", least=1)


@dataclasses.dataclass
class ParallelConfig:
    """Sizes of the parallel groups; what is left of the world is data parallel."""

    tensor: int = key(1, "ranks that share each layer's products", least=1)
    pipeline: int = key(1, "stages, each with a part of the layers", least=1)
    virtual_pipeline: int = key(1, "model chunks per pipeline stage (megatron)", least=1)
    stage_layers: list[int] | None = key(None, "layers of each chunk, first to last; null: cut by cost", least=0)
    context: int = key(1, "ranks that share each sequence, its attention and activations (megatron)", least=1)
    sequence: bool = key(False, "sequence parallelism over the tensor-parallel group")
    gpu_memory_gib: float = key(80.0, "GiB of one GPU, for the plan's warning", over=0)
    zero_stage: int = key(
        1,
        "what data-parallel ranks split: 1 optimizer state, 2 gradients too, 3 weights too (deepspeed)",
        choices=(1, 2, 3),
    )


@dataclasses.dataclass
class TrainConfig(shared.TrainConfig):
    min_lr: float = key(3e-5, "learning rate that a schedule decays to", least=0)
    global_batch_tokens: int = key(about="positions per optimizer step, padding included", least=1)
    micro_batch_size: int = key(1, "packed rows of seq_len positions per forward pass", least=1)
    seq_len: int = key(about="positions of a row", least=1)
    parts: list[str] = key(list(PARTS), "what is trained; the rest stays as it starts", choices=tuple(PARTS))
    recompute: bool = key(False, "compute activations again in the backward pass, layer by layer")
    loss: dict[str, float] = key(
        {}, "weights of the mean losses in the total, of text or a stream; 1 where not named", least=0
    )


@dataclasses.dataclass
class RunConfig(shared.RunConfig):
    name: str = key("pretrain", "its name in wandb")
    samples: list[str] = key([], "prompts that are drawn from checkpoints")
    samples_every: int | None = key(None, "steps between drawings; a multiple of checkpoint.every", least=1)


@dataclasses.dataclass
class CheckpointConfig(shared.CheckpointConfig):
    start: str | None = key(
        None, "else take the weights of this checkpoint, run or conversion; the optimizer starts anew"
    )
    background: bool = key(True, "write while training goes on")


@dataclasses.dataclass
class PretrainConfig:
    engine: str = key("megatron", "what trains", choices=("megatron", "deepspeed"))
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def resolve(self) -> None:
        """Fill what the model's preset says; UserError for what does not go together under any layout."""
        self.model.resolve()
        self.run.check()
        self.train.check("train", self.train.steps)
        if not self.train.parts:
            raise UserError(f"train.parts=[] trains nothing; name at least one of: {', '.join(PARTS)}")
        if self.data.validation_every is not None and not self.data.validation:
            raise UserError(f"data.validation_every={self.data.validation_every} needs shard sets in data.validation")
        trained = set(map(os.path.realpath, self.data.sets))
        if both := [root for root in self.data.validation if os.path.realpath(root) in trained]:
            raise UserError(f"data.validation holds out '{both[0]}', which data.sets trains on")
        drawn_every, saved_every = self.run.samples_every, self.checkpoint.every
        if drawn_every is not None and not (self.run.samples and saved_every and drawn_every % saved_every == 0):
            raise UserError(
                f"run.samples_every={drawn_every} draws the prompts in run.samples from checkpoints: give some, and a "
                f"multiple of checkpoint.every={saved_every}"
            )
