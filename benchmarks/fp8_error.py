"""Error of bf16 and of FP8 in a trained model, layer by layer, against fp32.

    python benchmarks/fp8_error.py --checkpoint runs/scenes/pretrain [--samples 32]

The same weights run forward and backward on the same documents of the run's sets in fp32, in bf16, and in bf16 with
the transformer's products in FP8 (train.fp8). Of each layer: how far what it gives out, the gradient that it hands down
and the gradients of its linear weights are from fp32's (norm of the difference / norm), with the errors in them that
the layers before have made, of gradients those after. On the CPU, whose products of FP8 matrices round as a GPU's do.
"""

import argparse
import tempfile

from megadual.engine import cpu

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from torch import Tensor  # noqa: E402

from megadual.data.dataset import MicroBatch, collate  # noqa: E402
from megadual.engine.groups import initialize_groups  # noqa: E402
from megadual.engine.megatron import build_chunks  # noqa: E402
from megadual.engine.megatron_internals import multiply_in_fp8  # noqa: E402
from megadual.errors import command  # noqa: E402
from megadual.hf.tensors import CheckpointTensors  # noqa: E402
from megadual.hf.verification import read_samples  # noqa: E402
from megadual.model import fp8  # noqa: E402
from megadual.train.checkpoint import load_run_config, resolve_checkpoint  # noqa: E402
from megadual.train.config import ParallelConfig, PretrainConfig  # noqa: E402
from megadual.train.setup import Inputs, read_inputs  # noqa: E402

WAYS = {"fp32": ("fp32", False), "bf16": ("bf16", False), "FP8": ("bf16", True)}
SHOWN = ("output", "gradient", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def run_model(
    run: PretrainConfig, trainer: CheckpointTensors, inputs: Inputs, batch: MicroBatch, way: str
) -> dict[str, Tensor]:
    """The loss, and of each layer what SHOWN names, keyed LAYER.NAME."""
    run.train.precision, run.train.fp8 = WAYS[way]
    (model,) = build_chunks(run, inputs.vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(trainer.read(name))
    if run.train.fp8:
        fp8.update(multiply_in_fp8([model]), parallel_state.get_tensor_model_parallel_group())
    found: dict[str, Tensor] = {}

    def watch(number: int):
        def hook(_, args, named, output):
            hidden = output[0] if isinstance(output, tuple) else output
            found[f"{number}.output"] = hidden.detach().float()
            given = args[0] if args else named["hidden_states"]
            given.register_hook(lambda gradient: found.update({f"{number}.gradient": gradient.float()}))

        return hook

    for number, layer in enumerate(model.decoder.layers, start=1):
        layer.register_forward_hook(watch(number), with_kwargs=True)
    losses = model(batch)
    drawn = max(len(batch.predicts_codes_at), 1)
    total = losses.text / max(len(batch.predicts_text_at), 1)
    for stream in inputs.vocabulary.streams:
        total = total + losses.visual[stream.name].sum() / (drawn * stream.depth)
    total.backward()
    for number, layer in enumerate(model.decoder.layers, start=1):
        for name, parameter in layer.named_parameters():
            kind = next((each for each in SHOWN if f"{each}.weight" in name), None)
            if kind:
                found[f"{number}.{kind}"] = parameter.grad.float()
    return found | {"loss": total.detach().float()}


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def table(found: dict[str, dict[str, Tensor]], layers: int) -> str:
    exact = found["fp32"]
    rows = ["| layer | " + " | ".join(SHOWN) + " |", "| --- |" + " --- |" * len(SHOWN)]
    for number in range(1, layers + 1):
        cells = [
            " / ".join(f"{100 * error(found[way][name], exact[name]):.2f}" for way in ("bf16", "FP8"))
            for name in (f"{number}.{each}" for each in SHOWN)
        ]
        rows.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="RUN, RUN/checkpoints or RUN/checkpoints/STEP")
    parser.add_argument("--samples", type=int, default=32, help="documents of the run's sets")
    args = parser.parse_args(argv)
    checkpoint = resolve_checkpoint(args.checkpoint)
    run, trainer = load_run_config(checkpoint), CheckpointTensors(checkpoint)
    inputs = read_inputs(run)
    samples, kinds = read_samples(inputs.sets, inputs.marks, run.train.seq_len, args.samples)
    batch = collate(samples, inputs.marks, keys=[str(i) for i in range(len(samples))])
    run.parallel, run.checkpoint.start = ParallelConfig(), None
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        initialize_groups(run)
        found = {way: run_model(run, trainer, inputs, batch, way) for way in WAYS}
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    print(f"{checkpoint}, {kinds}, {batch.filled} positions; error in % of fp32's norm: bf16 / FP8\n")
    print(table(found, run.model.layers))
    print("\nloss " + ", ".join(f"{way} {of['loss'].item():.5f}" for way, of in found.items()))


if __name__ == "__main__":
    main()
