"""Is an exported folder the checkpoint that it was made from? Every tensor bitwise, how it reads and generates, and the
logits of real samples.

Tensors are compared one at a time, in both directions of the mapping table. For the logits the trainer's model runs
here, on packed samples of a shard set, then the exported one in a process of its own that cannot import megadual; both
in fp32, which needs 4 bytes a parameter.
"""

import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from megadual.engine import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402

from megadual.data.dataset import MicroBatch, collate  # noqa: E402
from megadual.data.layout import Reading, Sequence, to_sequence  # noqa: E402
from megadual.data.source import Source  # noqa: E402
from megadual.engine.groups import initialize_groups  # noqa: E402
from megadual.engine.megatron import build_chunks  # noqa: E402
from megadual.errors import UserError  # noqa: E402
from megadual.hf.configuration_megadual import MegaDualConfig  # noqa: E402
from megadual.hf.export import Exported, model_config, read_dualtoken, write_settings  # noqa: E402
from megadual.hf.mapping import origins, to_hf  # noqa: E402
from megadual.hf.tensors import CheckpointTensors, FolderTensors, read_json  # noqa: E402
from megadual.streams import Lengths, Marks  # noqa: E402
from megadual.text import load_text_tokenizer  # noqa: E402
from megadual.train.checkpoint import load_run_config  # noqa: E402
from megadual.train.config import ParallelConfig, PretrainConfig, SetConfig  # noqa: E402
from megadual.train.setup import Inputs, read_inputs  # noqa: E402

TOLERANCE = 1e-4
# Drawn where that is open, without the text and without the images that may be left out: documents take them in turn.
READINGS = ((True, False, False), (False, False, False), (True, True, False), (True, True, True))


def same(left: Tensor, right: Tensor) -> bool:
    """Bitwise, in shape and dtype too; NaN is like nothing, itself included."""
    if (left.shape, left.dtype) != (right.shape, right.dtype) or left.isnan().any():
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)))


def compare_tensors(expected: Exported, folder: FolderTensors) -> list[str]:
    """Names that differ: the folder's tensors against what the table makes of the checkpoint's, and back."""
    trainer, sizes = expected.trainer, expected.sizes
    common = expected.meta.keys() & folder.meta.keys()
    different = sorted(expected.meta.keys() ^ folder.meta.keys())
    fitting = {name for name in common if expected.meta[name].shape == folder.meta[name].shape}
    back = {name: origin for name, origin in origins(common).items() if fitting.issuperset(origin.names)}
    for name in tqdm(trainer.meta, unit="tensor", mininterval=1 if sys.stderr.isatty() else 10):
        tensor = trainer.read(name)
        for hf_name, part in to_hf(name, tensor, sizes).items():
            if hf_name in common and not same(folder.read(hf_name), part):
                different.append(hf_name)
        rows = sizes.text_size if len(tensor) == sizes.padded_text_size else None  # padding is not exported
        if name not in back or not same(back[name].merge(folder.read, sizes)[:rows], tensor[:rows]):
            different.append(name)
    for name in expected.dualtoken.meta:
        hf_name = f"dualtoken.{name}"
        if hf_name in common and not same(folder.read(hf_name), expected.dualtoken.read(name)):
            different.append(hf_name)
    return different


def compare_settings(run: PretrainConfig, config: MegaDualConfig, tokenizer, folder: Path) -> list[str]:
    """Files that are missing or say something else than an export of today would: config, tokenizer, how it generates.

    Of the code that the folder carries they must be there: what it does is seen in the logits.
    """
    with tempfile.TemporaryDirectory() as scratch:
        write_settings(Path(scratch), run, tokenizer, config)
        expected = {path.name: _setting(path) for path in Path(scratch).iterdir()}
        return sorted(name for name in expected if _setting(folder / name) != expected[name])


def _setting(path: Path) -> Any:
    """What a file says, None where it is missing."""
    if not path.is_file():
        return None
    if path.suffix == ".py":
        return "there"
    if path.suffix != ".json":
        return path.read_bytes()
    return {name: value for name, value in read_json(path).items() if name != "transformers_version"}


def kinds_of(lengths: Lengths) -> dict[str, np.ndarray]:
    """Which documents are of which kind, each of one."""
    pairs, edits, chats = lengths.captions > 0, lengths.droppable_image > 0, lengths.marks > 0
    conversations = chats & ~edits & ~pairs
    kinds = {"pairs": pairs, "edits": edits & ~pairs, "conversations": conversations}
    return kinds | {"documents": ~pairs & ~edits & ~conversations}


def read_samples(sources: list[Source], marks: Marks, seq_len: int, count: int) -> tuple[list[Sequence], dict]:
    """`count` documents with images that fit, as many of each kind of each set as there are, read in turn as READINGS
    say; and how many there are of each kind."""
    waiting = []  # of each kind of each set, the documents
    for source in sources:
        lengths = source.documents.lengths
        usable = (lengths.sequence_length() <= seq_len) & (lengths.images > 0)
        for kind, of_kind in kinds_of(lengths).items():
            if len(found := (usable & of_kind).nonzero()[0][:count]):
                waiting.append((kind, source, found.tolist()))
    samples, kinds = [], Counter()
    for turn in range(count):
        draw, *dropped = READINGS[turn % len(READINGS)]
        for kind, source, found in waiting:
            if turn < len(found) and len(samples) < count:
                document = source.documents[found[turn]]
                asked = source.prompts[turn % len(source.prompts)] if source.prompts and kind == "pairs" else None
                reading = Reading((draw,) * len(document.grids), *dropped, prompt=asked)
                samples.append(to_sequence(document, marks, reading))
                kinds[kind] += 1
    if not samples:
        roots = ", ".join(f"'{source.documents.root}'" for source in sources)
        raise UserError(
            f"--samples {count}: no document with images of {roots} fits in train.seq_len {seq_len}; give another set "
            "with --data, or --samples 0"
        )
    return samples, dict(kinds)


@torch.no_grad()
def trainer_logits(
    run: PretrainConfig, trainer: CheckpointTensors, inputs: Inputs, batch: MicroBatch
) -> dict[str, Tensor]:
    """The trainer's model on packed samples: text (T, padded vocabulary), and by stream (P, D, K)."""
    run.parallel, run.train.precision, run.checkpoint.start = ParallelConfig(), "fp32", None
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        initialize_groups(run)
        (model,) = build_chunks(run, inputs.vocabulary)
        for name, parameter in model.named_parameters():
            parameter.copy_(trainer.read(name))
        hidden_TH = model.hidden_states(batch).squeeze(1)
        logits = {"text": hidden_TH @ model.output_weight().T}
        at = batch.predicts_codes_at
        for stream, head in model.heads.items():
            codes_PD, codebook = batch.codes[stream][at + 1], model.head_codebooks[stream]
            logits[stream] = head.logits(hidden_TH[at], codes_PD[:, :-1], codebook)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return logits


def exported_logits(folder: Path, samples: list[Sequence], image: int, python: str) -> dict[str, Tensor]:
    """The exported model on each sample by itself, joined in their order; `python` runs it."""
    tensors = {}
    for i, sample in enumerate(samples):
        tokens = torch.from_numpy(sample.tokens)
        tensors[f"{i}.tokens"] = tokens
        for stream, codes in sample.codes.items():
            tensors[f"{i}.codes.{stream}"] = torch.from_numpy(codes.astype(np.int64))[tokens == image]
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = f"{scratch}/inputs.safetensors", f"{scratch}/outputs.safetensors"
        save_file(tensors, inputs)
        script = Path(__file__).with_name("logits_of_export.py")
        command = [python, "-I", str(script), str(folder.resolve()), inputs, outputs]
        environment = os.environ | {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"the exported model in '{folder}' does not run: {reason}")
        found = load_file(outputs)
    return {key: torch.cat([found[f"{i}.{key}"] for i in range(len(samples))]) for key in ("text", *samples[0].codes)}


def compare_logits(
    run: PretrainConfig, trainer: CheckpointTensors, folder: Path, text_size: int, count: int, python: str
) -> dict:
    """The report's part on logits."""
    inputs = read_inputs(run)
    samples, kinds = read_samples(inputs.sets, inputs.marks, run.train.seq_len, count)
    batch = collate(samples, inputs.marks, keys=[str(i) for i in range(len(samples))])
    ours = trainer_logits(run, trainer, inputs, batch)
    ours["text"] = ours["text"][:, :text_size]
    theirs = exported_logits(folder, samples, inputs.marks.image, python)
    differences = {stream: (ours[stream] - theirs[stream]).abs().max().item() for stream in ours}
    finite = all(map(math.isfinite, differences.values()))
    return {
        "samples": len(samples),
        "kinds": kinds,
        "logits_compared": {stream: logits.numel() for stream, logits in ours.items()},
        "logit_std": {stream: _number(logits.std().item()) for stream, logits in ours.items()},
        "max_abs_logit_diff_per_stream": {stream: _number(most) for stream, most in differences.items()},
        "max_abs_logit_diff": max(differences.values()) if finite else None,
        "tolerance": TOLERANCE,
    }


def _number(x: float) -> float | None:
    """JSON has no NaN."""
    return x if math.isfinite(x) else None


def verify(checkpoint: Path, folder: Path, count: int, data: str | None, python: str) -> dict:
    """The report: tensors and files compared and different, and the largest difference of the logits of each stream.

    `count` documents of the shard set `data` (None: of the run's sets) are compared on; `python` runs the export. A
    difference that is not finite is None, and no equality.
    """
    run = load_run_config(checkpoint)
    if data:
        run.data.sets = [SetConfig(data)]
    if count and not run.data.sets:
        raise UserError(f"checkpoint '{checkpoint}' was made without data; give --data SET, or --samples 0")
    tokenizer = load_text_tokenizer(run.model.text_tokenizer)
    text_size, exported = len(tokenizer), FolderTensors(folder)
    trainer = CheckpointTensors(checkpoint)
    expected = Exported(run, trainer, text_size)
    config = model_config(run, tokenizer, read_dualtoken(run), expected.meta["model.norm.weight"].dtype)
    expected.check(config)
    different, files = compare_tensors(expected, exported), compare_settings(run, config, tokenizer, folder)
    report = {
        "checkpoint": checkpoint.name,
        "tensors_compared": len(exported.meta),
        "tensors_different": different,
        "files_different": files,
    }
    report |= compare_logits(run, trainer, folder, text_size, count, python) if count else {}
    most = report.get("max_abs_logit_diff", 0.0)
    report["equal"] = not different and not files and most is not None and most <= TOLERANCE
    return report
