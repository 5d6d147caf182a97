"""How much memory the export of a large checkpoint takes, beside the bound that it is to keep.

`python benchmarks/export_memory.py --output DIR` writes a checkpoint of random weights of the 7B shape with fewer
layers (all other widths, the vocabulary and the DualToken in full), exports it, compares its tensors with the folder's
and makes a checkpoint of the folder again, each in a process of its own, whose peak resident memory it prints. The
bound: 1.3 times the largest file that the export wrote, and 2 GB. Takes twice the checkpoint's space on disk.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megadual.engine import cpu

cpu.install()

from megadual.config import load_config  # noqa: E402
from megadual.errors import UserError, command  # noqa: E402
from megadual.hf.export import model_config  # noqa: E402
from megadual.hf.folder import exported_shapes  # noqa: E402
from megadual.hf.mapping import Sizes, origins  # noqa: E402
from megadual.hf.tensors import write_checkpoint, write_folder  # noqa: E402
from megadual.model.dual_lm import Vocabulary  # noqa: E402
from megadual.streams import END_OF_TEXT, SPECIAL_TOKENS  # noqa: E402
from megadual.text import load_text_tokenizer, save_text_tokenizer  # noqa: E402
from megadual.train.checkpoint import seal_weights  # noqa: E402
from megadual.train.config import PretrainConfig  # noqa: E402
from megadual.vision.presets import preset  # noqa: E402

ROOT = Path(__file__).parents[1]
TEXT_IDS = 151_665  # of Qwen2.5's tokenizer
BLOCK = torch.randn(
    1 << 24, generator=torch.Generator().manual_seed(0)
)  # random numbers, of which all weights are made


def random_weights(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The same numbers over and over: to draw them all would take longer than what is measured."""
    return BLOCK.to(dtype).repeat(shape.numel() // len(BLOCK) + 1)[: shape.numel()].view(shape)


def write_inputs(folder: Path, layers: int) -> None:
    """A text tokenizer of Qwen2.5's size, a DualToken of the released size, and the checkpoint."""
    backend = Tokenizer(models.WordLevel({END_OF_TEXT: 0, **{str(i): i for i in range(1, TEXT_IDS)}}, END_OF_TEXT))
    save_text_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT), folder / "text")
    tokenizer = load_text_tokenizer(folder / "text")
    assert len(tokenizer) == TEXT_IDS + len(SPECIAL_TOKENS) - 1

    overrides = ["model.preset=7b", f"model.layers={layers}", "train.precision=bf16", "train.steps=1", "data.sets=[]"]
    overrides += ["train.seq_len=4096", "train.global_batch_tokens=4096", f"run.dir={folder}"]
    overrides += [f"model.dualtoken={folder / 'dualtoken'}", f"model.text_tokenizer={folder / 'text'}"]
    run = load_config(PretrainConfig, None, overrides)
    dualtoken = preset("siglip2-so400m-256-rvq4")
    shapes = exported_shapes(model_config(run, tokenizer, dualtoken, torch.bfloat16))
    prefix = "dualtoken."
    own = {name.removeprefix(prefix): tensor for name, tensor in shapes.items() if name.startswith(prefix)}
    (folder / "dualtoken").mkdir()
    dualtoken.save(folder / "dualtoken")
    tensors = ((name, random_weights(tensor.shape, tensor.dtype)) for name, tensor in own.items())
    write_folder(folder / "dualtoken", own, tensors, max_shard_size=1 << 62)

    padded = Vocabulary(len(tokenizer), [], {}).padded_text_size
    sizes = Sizes(run.model.heads, run.model.kv_heads, len(tokenizer), padded)

    def shape_of(name: str) -> Tensor:
        return shapes[name] if name.startswith(prefix) else shapes[name].to(torch.bfloat16)

    meta = {name: origin.merge(shape_of, sizes) for name, origin in origins(shapes).items()}
    write_checkpoint(folder / "checkpoint", meta, lambda name: random_weights(meta[name].shape, meta[name].dtype))
    seal_weights(folder / "checkpoint", run)


def measure(tool: str, *args: object) -> None:
    """Run one of checkpoints_tools and print its seconds and peak resident memory, of which files' pages are part."""
    command = [sys.executable, "-m", f"checkpoints_tools.{tool}", *map(str, args)]
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{' '.join(command)} failed")
    print(f"{tool:16} {time.perf_counter() - begun:6.1f} s   peak {usage.ru_maxrss * 1024 / 1e9:5.2f} GB", flush=True)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", required=True, type=Path, help="folder for checkpoint and export; removed at the end"
    )
    parser.add_argument("--layers", type=int, default=6, help="of the 7B shape's 28; a layer takes 0.47 GB")
    parser.add_argument("--max-shard-size", default="5GB")
    args = parser.parse_args(argv)
    folder = args.output.resolve()
    if folder.exists():
        raise UserError(f"--output '{folder}' exists; give a new folder")
    folder.mkdir(parents=True)
    try:
        write_inputs(folder, args.layers)
        read = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"checkpoint and DualToken of {read / 1e9:.1f} GB, {args.layers} layers", flush=True)
        checkpoint, exported = folder / "checkpoint", folder / "hf"
        measure(
            "convert_to_hf", "--checkpoint", checkpoint, "--output", exported, "--max-shard-size", args.max_shard_size
        )
        measure("verify", "--checkpoint", checkpoint, "--model", exported, "--samples", 0)
        shutil.rmtree(checkpoint)
        measure("convert_from_hf", "--model", exported, "--output", folder / "start")
        files = [path.stat().st_size for path in exported.glob("*.safetensors")]
        bound = 1.3 * max(files) + 2e9
        print(f"files written: {len(files)}, the largest of {max(files) / 1e9:.2f} GB; bound {bound / 1e9:.2f} GB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
