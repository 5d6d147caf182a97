"""Speed of one training step on one GPU, beside the same model as it is usually put together.

python benchmarks/train_step.py [--layers 4] [--seq-len 4096] [--documents 1] [--output result.json]
python benchmarks/train_step.py --only "ours in the engine" "ours with muon" --micro-batches 64

Random weights in bf16, one micro-batch of one row of which half are image positions to be drawn. "ours" is the model
that pretrain.py trains: alone (gradients in bf16, as the baselines'), and in the megatron engine, which adds fp32
gradients, weights and moments; "with muon" is that with train.optimizer=muon, whose work does not depend on the batch:
give as many micro-batches a step as a GPU has; "in fp8" is with train.fp8=true. "plain" is Hugging Face's Qwen2 with
plain depth heads, eager and by torch.compile, with bf16 weights, gradients and moments; "amp" has fp32 ones under
autocast. Medians of CUDA-event times. FLOPs are the model's (megadual/model/flops.py) for all, so TFLOP/s and MFU
compare as tokens/s do. Each
contestant is run in a process of its own.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from megadual.engine import cpu

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gpu_timing import kernels_of, milliseconds  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from plain_unified import PlainUnified  # noqa: E402

from megadual.config import load_config  # noqa: E402
from megadual.data.dataset import MicroBatch, collate  # noqa: E402
from megadual.data.layout import Reading, to_sequence  # noqa: E402
from megadual.engine.estimate import estimate  # noqa: E402
from megadual.engine.groups import initialize_groups  # noqa: E402
from megadual.engine.megatron import MegatronEngine  # noqa: E402
from megadual.engine.megatron_internals import multiply_in_fp8  # noqa: E402
from megadual.engine.stages import Traffic  # noqa: E402
from megadual.engine.topology import topology  # noqa: E402
from megadual.errors import command  # noqa: E402
from megadual.model import fp8  # noqa: E402
from megadual.model.attention import gpu_kernel  # noqa: E402
from megadual.model.dual_lm import DualLM, Vocabulary  # noqa: E402
from megadual.model.flops import peak_flops, step_flops  # noqa: E402
from megadual.streams import Document, Stream  # noqa: E402
from megadual.testing.shards import SPECIAL  # noqa: E402
from megadual.train.config import PretrainConfig  # noqa: E402

ALONE, ADAMW, MUON, FP8 = "ours alone", "ours in the engine", "ours with muon", "ours in fp8"
ALONE_FP8 = "ours alone in fp8"
CONTESTANTS = (ALONE, "plain compiled", ADAMW, "plain", "plain compiled amp", MUON, ALONE_FP8, FP8)
GIB = 2**30


def setting(args) -> tuple[PretrainConfig, Vocabulary]:
    """The run's config and vocabulary: the released sizes of 384 px, or tiny ones."""
    config = Path(__file__).parents[1] / "pretrain/configs/7b.yaml"
    overrides = [
        f"model.preset={args.preset}", f"model.layers={args.layers}", "parallel.tensor=1", "parallel.pipeline=1",
        "parallel.sequence=false", f"train.seq_len={args.seq_len}", f"train.global_batch_tokens={args.seq_len}",
        "model.dualtoken=random", "model.text_tokenizer=random", "data.sets=[random]", "run.dir=unused",
    ]  # fmt: skip
    run = load_config(PretrainConfig, config, overrides)
    text, classes, width, depth = (300, 64, 8, 8) if args.preset == "tiny" else (152_064, 16_384, 32, 8)
    generator = torch.Generator().manual_seed(0)
    streams = [Stream(name, depth, classes, width) for name in ("semantic", "pixel")]
    codebooks = {stream.name: torch.randn(classes, width, generator=generator) for stream in streams}
    return run, Vocabulary(text, streams, codebooks)


def micro_batch(run: PretrainConfig, vocabulary: Vocabulary, documents: int) -> MicroBatch:
    """A row of `documents` equal documents, each text and then an image to draw of half of its positions."""
    random = np.random.default_rng(0)
    length = run.train.seq_len // documents
    image = length // 2
    sequences = []
    for _ in range(documents):
        text = random.integers(6, vocabulary.text_size, length - image - 3)
        codes = {s.name: random.integers(0, s.codebook_size, (image, s.depth)) for s in vocabulary.streams}
        document = Document("", np.append(text, SPECIAL.image), codes, np.array([[1, image]]))
        sequences.append(to_sequence(document, SPECIAL, Reading((True,))))
    return collate(sequences, SPECIAL, [f"{i}" for i in range(documents)])


def flops_of(run: PretrainConfig, vocabulary: Vocabulary, batch: MicroBatch) -> float:
    return step_flops(
        run.model, vocabulary, batch.filled, sum(n**2 for n in batch.lengths), len(batch.image_at),
        len(batch.predicts_text_at), len(batch.predicts_codes_at),
    )  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def forward_backward_of(model: torch.nn.Module, loss_of):
    """One forward and backward pass of `loss_of()`, gradients made anew."""

    def run():
        for parameter in model.parameters():
            parameter.grad = None
        loss_of().backward()

    return run


def measure_plain(name: str, run: PretrainConfig, vocabulary: Vocabulary, batch: MicroBatch, args) -> dict:
    amp = name.endswith("amp")
    torch.set_default_device(device())
    model = PlainUnified(run.model, vocabulary).to(device())
    torch.set_default_device(None)
    if not amp:
        model.bfloat16()
    called = torch.compile(model) if "compiled" in name else model

    def loss():
        with torch.autocast(device().type, torch.bfloat16, enabled=amp):
            return called(batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    both = forward_backward_of(model, loss)

    def step():
        both()
        optimizer.step()

    return {"forward_backward_ms": milliseconds(both, args.repeats), "step_ms": milliseconds(step, args.repeats)}


def measure_ours(run: PretrainConfig, vocabulary: Vocabulary, batch: MicroBatch, args) -> dict:
    """The model alone, and where its time goes."""
    initialize_groups(run)
    model = DualLM(run, vocabulary)
    if run.train.fp8:
        fp8.update(multiply_in_fp8([model]), parallel_state.get_tensor_model_parallel_group())

    def total(losses):
        drawn = len(batch.predicts_codes_at)
        visual = sum(losses.visual[stream.name].sum() / (drawn * stream.depth) for stream in vocabulary.streams)
        return losses.text / len(batch.predicts_text_at) + visual

    kernel = gpu_kernel(run.model.hidden // run.model.heads)
    result = {
        "kernel": getattr(kernel, "func", kernel).__name__ if torch.cuda.is_available() else "SDPA",
        "forward_backward_ms": milliseconds(forward_backward_of(model, lambda: total(model(batch))), args.repeats),
        "peak_gib_forward_backward": peak_gib(),
    }
    parts = parts_of(run, vocabulary, model, batch)
    for name, (loss, flops) in parts.items():
        ms = milliseconds(forward_backward_of(model, loss), args.repeats)
        result.setdefault("parts", {})[name] = {"ms": ms, "tflops": flops / ms / 1e9}
    result["kernels"] = kernels_of(forward_backward_of(model, lambda: total(model(batch))))
    return result


def parts_of(run: PretrainConfig, vocabulary: Vocabulary, model: DualLM, batch: MicroBatch) -> dict:
    """Name -> (something to differentiate, its model FLOPs)."""
    positions, squares = batch.filled, sum(n**2 for n in batch.lengths)
    hidden = model.hidden_states(batch).detach().requires_grad_()
    layers = step_flops(run.model, vocabulary, positions, squares, len(batch.image_at), 0, 0)
    text = step_flops(run.model, vocabulary, 0, 0, 0, len(batch.predicts_text_at), 0)
    drawn = step_flops(run.model, vocabulary, 0, 0, 0, 0, len(batch.predicts_codes_at))
    return {
        "embedding and layers": (lambda: model.hidden_states(batch).float().sum(), layers),
        "text output layer": (lambda: model._text_loss(hidden, batch), text),
        "visual heads": (lambda: torch.cat(list(model._visual_losses(hidden, batch).values())).sum(), drawn),
    }


def measure_engine(run: PretrainConfig, vocabulary: Vocabulary, batch: MicroBatch, args) -> dict:
    """Whole steps of the engine, of one and of several micro-batches; the plan's estimate of memory."""
    layout = topology(run, 1)
    run.parallel.stage_layers = [run.model.layers]
    engine = MegatronEngine(run, layout, vocabulary)
    batch = batch.to("cpu")
    result = {"step_ms": milliseconds(lambda: engine.train_step([batch]), args.repeats)}
    count = args.micro_batches
    several = milliseconds(lambda: engine.train_step([batch] * count), max(1, args.repeats // 4), warmup=1)
    result["ms_a_micro_batch_of_several"] = several / count
    positions = batch.filled
    traffic = Traffic(
        len(batch.predicts_text_at) / positions, len(batch.predicts_codes_at) / positions,
        len(batch.image_at) / positions, sum(n**2 for n in batch.lengths) / positions,
    )  # fmt: skip
    (stage,) = estimate(run, layout, vocabulary, traffic)
    result["estimate_gib"] = {
        name: getattr(stage, name) / GIB for name in ("weights", "gradients", "optimizer", "activations", "logits")
    } | {"total": stage.total / GIB}
    result["kernels"] = kernels_of(lambda: engine.train_step([batch]))
    return result


def measure(name: str, args) -> dict:
    """Run one contestant in this process."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    run, vocabulary = setting(args)
    run.train.optimizer = "muon" if name == MUON else "adamw"
    run.train.fp8 = name in (ALONE_FP8, FP8)
    batch = micro_batch(run, vocabulary, args.documents).to(device())
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    vocabulary.codebooks = {stream: book.to(device()) for stream, book in vocabulary.codebooks.items()}
    if name.startswith("plain"):
        result = measure_plain(name, run, vocabulary, batch, args)
    else:
        alone = name in (ALONE, ALONE_FP8)
        result = (measure_ours if alone else measure_engine)(run, vocabulary, batch, args)
    flops = flops_of(run, vocabulary, batch)
    result |= {"peak_gib": peak_gib(), "flops": flops, "tokens": batch.filled, "peak_flops": peak_flops()}
    gc.collect()
    dist.destroy_process_group()
    return result


def row(name: str, result: dict, key: str) -> str:
    ms, flops, peak = result[key], result["flops"], result["peak_flops"]
    mfu = f"{flops / ms * 1e3 / peak:.1%}" if peak else "-"
    memory = result.get("peak_gib_forward_backward" if key == "forward_backward_ms" else "peak_gib", result["peak_gib"])
    return f"| {name} | {result['tokens'] / ms * 1e3:,.0f} | {flops / ms / 1e9:.0f} | {mfu} | {memory:.1f} |"


TIMES = {
    "forward_backward_ms": "forward + backward",
    "step_ms": "with the optimizer",
    "ms_a_micro_batch_of_several": "with the optimizer, several micro-batches a step",
}


def table(results: dict[str, dict]) -> str:
    lines = ["| | tokens/s | TFLOP/s | MFU | peak GiB |", "| --- | --- | --- | --- | --- |"]
    lines += [row(f"{name}: {what}", r, key) for key, what in TIMES.items() for name, r in results.items() if key in r]
    return "\n".join(lines)


def muons_cost(adamw: dict, muon: dict, micro_batches: int) -> str:
    """Its step beside AdamW's."""
    several = "ms_a_micro_batch_of_several"
    return (
        f"Muon's step takes {muon['step_ms'] - adamw['step_ms']:.0f} ms more than AdamW's: {muon['step_ms']:.0f} / "
        f"{adamw['step_ms']:.0f} ms = x {muon['step_ms'] / adamw['step_ms']:.3f} at one micro-batch, "
        f"x {muon[several] / adamw[several]:.3f} at {micro_batches}"
    )


def gain(bf16: str, before: dict, in_fp8: str, after: dict) -> str:
    """How much faster FP8 is, in all and by part."""
    times = {TIMES[key]: before[key] / after[key] for key in TIMES if key in before and key in after}
    times |= {part: v["ms"] / after["parts"][part]["ms"] for part, v in before.get("parts", {}).items()}
    return f"{in_fp8} beside {bf16}: " + ", ".join(f"{what} x {ratio:.2f}" for what, ratio in times.items())


def details(name: str, result: dict) -> str:
    """What only one contestant has: its memory beside the plan's, its parts, its kernels."""
    lines = []
    if "estimate_gib" in result:
        estimates = ", ".join(f"{part} {gib:.1f}" for part, gib in result["estimate_gib"].items())
        lines += [f"memory: {result['peak_gib']:.1f} GiB at most; the plan's estimate: {estimates}"]
    if "parts" in result:
        lines += [f"parts, forward + backward each by itself (attention: {result['kernel']})"]
        lines += [f"  {part:24} {v['ms']:7.2f} ms {v['tflops']:5.0f} TFLOP/s" for part, v in result["parts"].items()]
    if result.get("kernels"):
        lines += [f"GPU time of {name}, ms"]
        lines += [f"  {ms:8.2f}  {kind}" for kind, ms in sorted(result["kernels"]["kinds"].items())]
        lines += [f"  {ms:8.2f} {count:5} x {kernel}" for ms, count, kernel in result["kernels"]["longest"]]
    return "\n".join(lines)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="7b", help="tiny tries the benchmark itself, also without a GPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=1, help="in the row; the baselines attend over all of it")
    parser.add_argument("--micro-batches", type=int, default=8, help="of the engine's steps of several")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--here", action="store_true", help="run the one contestant in this process")
    parser.add_argument("--output", type=Path, help="JSON of everything measured")
    args = parser.parse_args()
    if args.here:
        args.output.write_text(json.dumps(measure(args.only[0], args)))
        return
    results = {}
    for name in args.only:
        print(f"== {name}", flush=True)
        path = Path(f"/tmp/train_step_{os.getpid()}.json")
        keys = ("preset", "layers", "seq_len", "documents", "micro_batches")
        sizes = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in keys]
        again = [sys.executable, __file__, *sizes, f"--repeats={args.repeats}", "--here", f"--output={path}"]
        begun = time.perf_counter()
        ended = subprocess.run([*again, "--only", name], check=False)
        if ended.returncode:
            print(f"{name} failed with exit code {ended.returncode}", flush=True)
            continue
        results[name] = json.loads(path.read_text())
        path.unlink()
        print(table({name: results[name]}), details(name, results[name]), sep="\n")
        print(f"{name}: {time.perf_counter() - begun:.0f} s in all", flush=True)
        if args.output:  # as far as it got, should it be stopped
            args.output.write_text(json.dumps(results, indent=1))
    print(table(results))
    if ADAMW in results and MUON in results:
        print(muons_cost(results[ADAMW], results[MUON], args.micro_batches))
    for bf16, in_fp8 in ((ALONE, ALONE_FP8), (ADAMW, FP8)):
        if bf16 in results and in_fp8 in results:
            print(gain(bf16, results[bf16], in_fp8, results[in_fp8]))


if __name__ == "__main__":
    main()
