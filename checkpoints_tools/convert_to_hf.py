"""A pretraining checkpoint -> a Hugging Face folder: model, text tokenizer and DualToken, with the code to run them.

`python checkpoints_tools/convert_to_hf.py --checkpoint RUN --output DIR`

The checkpoint may have been written under any layout; it is read in one process, without a GPU.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GenerationConfig

from megadual.engine import cpu

cpu.install()

import megadual  # noqa: E402
from checkpoints_tools.mapping import CODEBOOKS, Sizes, to_hf  # noqa: E402
from megadual.config import PretrainConfig  # noqa: E402
from megadual.errors import UserError, command  # noqa: E402
from megadual.hf.configuration_megadual import MegaDualConfig  # noqa: E402
from megadual.hf.modeling_megadual import MegaDualForCausalLM  # noqa: E402
from megadual.hf.processing_megadual import MegaDualProcessor  # noqa: E402
from megadual.model import presets  # noqa: E402
from megadual.streams import SPECIAL_TOKENS, SpecialIds  # noqa: E402
from megadual.text import load_text_tokenizer, save_text_tokenizer  # noqa: E402
from megadual.train.checkpoint import load_full_state, load_run_config, resolve_checkpoint  # noqa: E402
from megadual.vision import DualToken  # noqa: E402

# The modules that an exported folder carries, and the file that each becomes.
MODULES = {
    "megadual.hf.configuration_megadual": "configuration_megadual",
    "megadual.hf.modeling_megadual": "modeling_megadual",
    "megadual.hf.processing_megadual": "processing_megadual",
    "megadual.model.depth_head": "depth_head",
    "megadual.model.fused": "fused",
    "megadual.streams": "streams",
    "megadual.vision.config": "dualtoken_config",
    "megadual.vision.decoder": "dualtoken_decoder",
    "megadual.vision.projection": "dualtoken_projection",
    "megadual.vision.quantizer": "dualtoken_quantizer",
    "megadual.vision.tokenizer": "dualtoken_tokenizer",
}
AUTO_MAP = {
    "AutoConfig": "configuration_megadual.MegaDualConfig",
    "AutoModelForCausalLM": "modeling_megadual.MegaDualForCausalLM",
    "AutoProcessor": "processing_megadual.MegaDualProcessor",
}


def model_sizes(run: PretrainConfig, state: dict[str, Tensor], text_size: int) -> Sizes:
    """What the mapping table needs to know of a run."""
    return Sizes(run.model.heads, run.model.kv_heads, text_size, len(state["embedding.word_embeddings.weight"]))


def model_config(run: PretrainConfig, tokenizer, dualtoken: DualToken, dtype: torch.dtype) -> MegaDualConfig:
    """The exported model's config from the run's."""
    model, special = run.model, SpecialIds.of(tokenizer)
    text_config = dict(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.norm_eps,
        max_position_embeddings=run.train.seq_len,
        tie_word_embeddings=model.tie_embeddings,
    )
    return MegaDualConfig(
        text_config=text_config,
        rope_base=model.rope_base,
        head=vars(model.head),
        dualtoken=vars(dualtoken.config),
        special_ids=vars(special),
        architectures=["MegaDualForCausalLM"],
        auto_map=AUTO_MAP,
        dtype=str(dtype).removeprefix("torch."),
    )


def full_state(trainer: dict[str, Tensor], dualtoken: DualToken, sizes: Sizes, folder: str) -> dict[str, Tensor]:
    """All weights of the exported model; UserError if `dualtoken`, read from `folder`, has not the trained codes."""
    state = to_hf(trainer, sizes)
    for name, tensor in dualtoken.state_dict().items():
        if not re.search(r"\.codebooks\.[1-9]", name):  # the same tensor again
            state[f"dualtoken.{name}"] = tensor
    for left, right in CODEBOOKS.items():
        if not torch.equal(trainer[left], state[right][:-1]):
            raise UserError(f"the checkpoint's {left} are not the code vectors of the DualToken in '{folder}'")
    return state


def flat_code(module: str) -> str:
    """A module's source, its imports of MODULES made relative to the folder."""

    def relative(match: re.Match) -> str:
        imported = module.rpartition(".")[0] + match[1] if match[1].startswith(".") else match[1]
        return f"from .{MODULES[imported]} import"

    code = (Path(megadual.__file__).parents[1] / f"{module.replace('.', '/')}.py").read_text()
    return re.sub(r"^from (megadual[\w.]*|\.[\w.]+) import", relative, code, flags=re.MULTILINE)


def write_code(folder: Path) -> None:
    """Write MODULES as files that need nothing of megadual's."""
    code = {file: flat_code(module) for module, file in MODULES.items()}
    imports = {file: re.findall(r"^from \.(\w+) import", text, flags=re.MULTILINE) for file, text in code.items()}
    for entry in AUTO_MAP.values():
        file, needed = entry.partition(".")[0], []
        waiting = list(imports[file])
        while waiting:
            if (name := waiting.pop()) not in needed:
                needed.append(name)
                waiting += imports[name]
        named = "".join(f"    from .{name} import *  # noqa: F403\n" for name in sorted(set(needed) - {*imports[file]}))
        if named:
            code[file] += f"\n\nif False:  # transformers 4 brings only the files that this one names\n{named}"
    for file, text in code.items():
        (folder / f"{file}.py").write_text(text)


def model_card(run: PretrainConfig, checkpoint: str, state: dict[str, Tensor]) -> str:
    llm = sum(tensor.numel() for name, tensor in state.items() if not name.startswith("dualtoken."))
    data = "\n".join(f"- `{shard_set}`" for shard_set in run.data.sets)
    return f"""---
library_name: transformers
pipeline_tag: any-to-any
tags: [megadual, multimodal, image-generation, image-to-text]
---
# {run.run.name}

A MegaDual model: one autoregressive transformer that reads and writes text and images. Every image position
carries a semantic and a pixel code of its DualToken, which is in this folder too.
{llm:,} parameters without the DualToken; {run.model.layers} layers, hidden size {run.model.hidden}.

```python
from PIL import Image
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder", trust_remote_code=True)
print(model.describe([Image.open("picture.png")])[0])
model.draw(["two red apples to the left of a cat, on blue"], cfg_scale=3.0, seed=0)[0].save("drawing.png")
```

`AutoProcessor` makes the inputs of `generate` for texts with `<image>` in them.

## Training
Checkpoint `{checkpoint}` of {run.train.steps} steps of {run.train.global_batch_tokens:,} positions, sequences of
{run.train.seq_len}, {run.train.precision}, peak learning rate {run.train.lr}, seed {run.train.seed}; images drawn with
probability {run.data.draw_probability}, captions dropped with probability {run.data.caption_dropout}.

Data (see each set's `manifest.json` for its origin and license):
{data}
"""


def read_dualtoken(run: PretrainConfig) -> DualToken:
    try:
        return DualToken.from_pretrained(run.model.dualtoken)
    except ValueError as error:
        raise UserError(f"model.dualtoken: {error}") from error


def export(run: PretrainConfig, trainer: dict[str, Tensor], name: str, output: Path) -> None:
    """Write the folder `output` for a run's full tensors, of checkpoint `name`; it appears only when it is whole."""
    tokenizer, dualtoken = load_text_tokenizer(run.model.text_tokenizer), read_dualtoken(run)
    sizes = model_sizes(run, trainer, len(tokenizer))
    state = full_state(trainer, dualtoken, sizes, run.model.dualtoken)
    config = model_config(run, tokenizer, dualtoken, trainer["decoder.final_layernorm.weight"].dtype)

    with torch.device("meta"):
        model = MegaDualForCausalLM(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if run.model.tie_embeddings:
        del expected["lm_head.weight"]
    assert {name: tensor.shape for name, tensor in state.items()} == expected, "weights do not fit the exported model"

    partial = output.with_name(f".partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_torch_state_dict(state, str(partial), max_shard_size="5GB")
    config.save_pretrained(partial)
    for weights in partial.glob("*.safetensors"):
        shutil.copymode(partial / "config.json", weights)  # they are written for their owner alone
    write_code(partial)
    generation = GenerationConfig(
        eos_token_id=config.special.end_of_text,
        pad_token_id=config.special.end_of_text,
        suppress_tokens=tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS[1:])),  # images are drawn, not spelled
    )
    generation.save_pretrained(partial)
    rows, columns = dualtoken.config.grid
    processor = MegaDualProcessor(tokenizer, image_size=dualtoken.config.image_size, image_positions=rows * columns)
    save_text_tokenizer(processor.tokenizer, partial)
    described = processor.to_dict() | {"processor_class": "MegaDualProcessor", "auto_map": AUTO_MAP}
    (partial / "processor_config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    (partial / "README.md").write_text(model_card(run, name, state))
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


def check_output(output: Path) -> None:
    """Refuse to replace anything but an export."""
    config = output / "config.json"
    if output.exists() and not (config.is_file() and json.loads(config.read_text()).get("model_type") == "megadual"):
        raise UserError(f"--output '{output}' exists and is not an exported model; give a new folder")


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Export a pretraining checkpoint to a Hugging Face folder.")
    parser.add_argument("--checkpoint", required=True, help="RUN, RUN/checkpoints or RUN/checkpoints/STEP")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    args = parser.parse_args(argv)
    check_output(args.output)
    checkpoint = resolve_checkpoint(args.checkpoint)
    run = load_run_config(checkpoint)
    run.model = presets.resolve(run.model)
    export(run, load_full_state(checkpoint), checkpoint.name, args.output)
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{checkpoint} -> {args.output} ({size / 1e6:,.1f} MB)")


if __name__ == "__main__":
    main()
