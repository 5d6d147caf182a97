"""What `pretrain/pretrain.py` takes."""

import dataclasses
import os

from megadual.data.layout import LOSSES
from megadual.errors import UserError
from megadual.keys import key
from megadual.model.config import ModelConfig
from megadual.model.freezing import PARTS
from megadual.run import config as shared

NOT_GIVEN = "not-given"
# What a plan without inputs (train/assume.py) has for keys that nothing gives.
PLANNED = [
    f"model.dualtoken={NOT_GIVEN}", f"model.text_tokenizer={NOT_GIVEN}", f"data.sets=[{NOT_GIVEN}]",
    f"run.dir={NOT_GIVEN}",
]  # fmt: skip


@dataclasses.dataclass
class SetConfig:
    """One shard set and how it is read. A path alone may stand for it."""

    path: str = key(about="shard set made by data_pipeline/tokenize.py: a folder, or a URL (s3://...)")
    weight: float | None = key(None, "its share of the rows; null for all sets: by their positions", over=0)
    draw: float = key(0.5, "share drawn of the images that may be drawn or looked at: of pairs, pages", least=0, most=1)
    loss: str = key(
        "assistant",
        "text with a loss: what the `assistant` says, with captions and documents; its `last_turn` alone; `full`: "
        "all text, marks included; `none`: drawn images alone",
        choices=LOSSES,
    )
    captions: str = key(
        "one", "of pairs with several captions: one at random each epoch, or all of them", choices=("one", "all")
    )
    prompts: list[str] = key(
        [], "what is asked of a pair that is described, in chat form, one at random; none: its caption alone"
    )
    caption_dropout: float = key(
        0.1, "share of drawn pairs whose caption is left out, for classifier-free guidance", least=0, most=1
    )
    text_dropout: float = key(0.05, "share of edits whose instruction is left out, likewise", least=0, most=1)
    image_dropout: float = key(0.05, "share of edits whose source image is left out", least=0, most=1)
    both_dropout: float = key(0.05, "share of edits whose instruction and source are left out", least=0, most=1)


@dataclasses.dataclass
class DataConfig:
    sets: list[SetConfig] = key(about="shard sets that are trained on: paths, or a path with settings of its own")
    validation: list[SetConfig] = key([], "shard sets that are held out, whose mean losses are logged as val_loss")
    validation_every: int | None = key(None, "steps between them; the last step has them too; null: it alone", least=1)
    validation_rows: int = key(256, "packed rows of them, the same ones each time; fewer are read again", least=1)
    cache: str | None = key(
        None, "folder on each node's own disk into which shards of sets at URLs come, once a node; needed for those"
    )
    cache_gb: float | None = key(
        None,
        "GB of it at most, the oldest shards are evicted; give it room for all sets, which are read all over; null: no "
        "bound",
        over=0,
    )
    verify: bool = key(
        False, "before training, hash all files of sets on disks and compare with what the sets say, shared among ranks"
    )

    @property
    def urls(self) -> list[str]:
        """The sets that are not on a disk."""
        return [each.path for each in self.sets + self.validation if "://" in each.path]

    def check(self) -> None:
        """UserError for settings of sets that do not go together."""
        if self.urls and self.cache is None:
            raise UserError(f"data.sets: '{self.urls[0]}' is a URL: give data.cache, a folder on each node's own disk")
        weighted = [each for each in self.sets if each.weight is not None]
        if weighted and len(weighted) < len(self.sets):
            path = next(each.path for each in self.sets if each.weight is None)
            raise UserError(
                f"data.sets: '{path}' has no weight, '{weighted[0].path}' has; give all of them one, or none"
            )
        for each in self.sets:
            if (dropped := each.text_dropout + each.image_dropout + each.both_dropout) > 1:
                raise UserError(
                    f"data.sets: '{each.path}': text_dropout, image_dropout and both_dropout are shares of the same "
                    f"documents, together {dropped:g}; at most 1"
                )
        trained = {os.path.realpath(each.path) for each in self.sets}
        if both := [each.path for each in self.validation if os.path.realpath(each.path) in trained]:
            raise UserError(f"data.validation holds out '{both[0]}', which data.sets trains on")


@dataclasses.dataclass
class ParallelConfig:
    """Sizes of the parallel groups; what is left of the world is data parallel."""

    layout: str = key(
        "given",
        "auto: in place of tensor, pipeline, virtual_pipeline, stage_layers, sequence and train.recompute, whatever "
        "the plan predicts to be fastest among what fits, anew at each start",
        choices=("given", "auto"),
    )
    tensor: int = key(1, "ranks that share each layer's products", least=1)
    pipeline: int = key(1, "stages, each with a part of the layers", least=1)
    virtual_pipeline: int = key(1, "model chunks per pipeline stage (megatron)", least=1)
    stage_layers: list[int] | None = key(None, "layers of each chunk, first to last; null: cut by cost", least=0)
    run_ahead: int = key(
        0,
        "micro-batches more that a pipeline's stage may have under way for each stage behind it, where those take a "
        "stage unequal times; each takes the memory of its activations (megatron, no virtual_pipeline)",
        least=0,
        most=1,
    )
    context: int = key(1, "ranks that share each sequence, its attention and activations (megatron)", least=1)
    sequence: bool = key(False, "sequence parallelism over the tensor-parallel group")
    gpu_memory_gib: float = key(80.0, "GiB of one GPU: what a layout has to fit", over=0)
    zero_stage: int = key(
        1,
        "what data-parallel ranks split: 1 optimizer state, 2 gradients too, 3 weights too (deepspeed)",
        choices=(1, 2, 3),
    )
    zero: dict[str, float] = key(
        {},
        "settings of DeepSpeed's zero_optimization, by their names there, switches as 0 and 1 (deepspeed)",
        least=0,
    )


@dataclasses.dataclass
class TrainConfig(shared.TrainConfig):
    optimizer: str = key(
        "adamw",
        "muon: orthogonalised momentum for the matrices between hidden states, AdamW for all else (megatron)",
        choices=("adamw", "muon"),
    )
    momentum: float = key(0.95, "decay of muon's momentum", least=0, below=1)
    fp8: bool = key(False, "products of the transformer's linear layers in FP8 (megatron; GPUs from H100 on)")
    grad_reduce_dtype: str = key(
        "fp32",
        "what data-parallel ranks exchange gradients in; each sums its own, and those that it gets, in fp32 (megatron)",
        choices=("fp32", "bf16"),
    )
    min_lr: float = key(3e-5, "learning rate that a schedule decays to", least=0)
    global_batch_tokens: int = key(about="positions per optimizer step, padding included", least=1)
    micro_batch_size: int = key(1, "packed rows of seq_len positions per forward pass", least=1)
    seq_len: int = key(about="positions of a row", least=1, most=1 << 24)
    parts: list[str] = key(list(PARTS), "what is trained; the rest stays as it starts", choices=tuple(PARTS))
    recompute: bool = key(False, "compute activations again in the backward pass, layer by layer")
    drawn_at_once: int | None = key(
        None,
        "drawn positions of a micro-batch whose activations in the visual heads are kept for the backward pass; those "
        "of more are computed again there, as many at a time; null: what a GPU's part of a micro-batch draws on "
        "average and a standard deviation more, so that one that draws most of its images takes little more memory",
        least=1,
    )
    loss: dict[str, float] = key(
        {}, "weights of the mean losses in the total, of text or a stream; 1 where not named", least=0
    )


@dataclasses.dataclass
class RunConfig(shared.RunConfig):
    name: str = key("pretrain", "its name in wandb")
    samples: list[str] = key([], "prompts that are drawn from checkpoints")
    samples_every: int | None = key(None, "steps between drawings; a multiple of checkpoint.every", least=1)
    evaluate_every: int | None = key(
        None, "steps between checkpoints that are scored on held-out scenes; a multiple of checkpoint.every", least=1
    )
    evaluate_detector: str | None = key(None, "detector that scores pictures (megadual.evaluate train-detector)")
    evaluate_corpus: str | None = key(None, "folder of the corpus that is trained on, whose scenes are left out")
    evaluate_scenes: int = key(100, "held-out samples of each task", least=1)


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
        self.run.check(self.train.steps)
        self.train.check("train", self.train.steps)
        if not self.train.parts:
            raise UserError(f"train.parts=[] trains nothing; name at least one of: {', '.join(PARTS)}")
        if self.data.validation_every is not None and not self.data.validation:
            raise UserError(f"data.validation_every={self.data.validation_every} needs shard sets in data.validation")
        self.data.check()
        scored_every, drawn_every, saved_every = self.run.evaluate_every, self.run.samples_every, self.checkpoint.every
        if scored_every is not None and not (saved_every and scored_every % saved_every == 0):
            raise UserError(
                f"run.evaluate_every={scored_every} scores checkpoints: give a multiple of "
                f"checkpoint.every={saved_every}"
            )
        if scored_every is not None and self.run.evaluate_detector is None:
            raise UserError(
                f"run.evaluate_every={scored_every} needs a detector: make one with python -m megadual.evaluate "
                "train-detector, and name it in run.evaluate_detector"
            )
        if drawn_every is not None and not (self.run.samples and saved_every and drawn_every % saved_every == 0):
            raise UserError(
                f"run.samples_every={drawn_every} draws the prompts in run.samples from checkpoints: give some, and a "
                f"multiple of checkpoint.every={saved_every}"
            )


def check_picked(run: PretrainConfig, overrides: list[str]) -> None:
    """UserError where the command line gives a size that parallel.layout=auto would replace."""
    picked = ["parallel." + name for name in ("tensor", "pipeline", "virtual_pipeline", "stage_layers", "sequence")]
    for override in overrides:
        if run.parallel.layout == "auto" and override.partition("=")[0] in [*picked, "train.recompute"]:
            raise UserError(f"{override} is given, but parallel.layout=auto picks that; add parallel.layout=given")
