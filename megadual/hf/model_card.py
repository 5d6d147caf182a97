"""The README.md of an exported folder: what the model is, how it is used, what it was trained on and how."""

import dataclasses
import json
from pathlib import Path

from omegaconf import OmegaConf
from torch import Tensor

from megadual.train.checkpoint import read_progress
from megadual.train.config import PretrainConfig

_TRAINED_BY = ("engine", "model", "data", "parallel", "train")  # the sections of a run's config that are shown


def model_card(run: PretrainConfig, checkpoint: Path, meta: dict[str, Tensor]) -> str:
    llm = sum(tensor.numel() for name, tensor in meta.items() if not name.startswith("dualtoken."))
    heads = dict.fromkeys(name.split(".")[1] for name in meta if name.startswith("heads."))
    streams = f"the {'stream' if len(heads) == 1 else 'streams'} {' and '.join(heads)} of"
    step = read_progress(checkpoint)["step"]
    return f"""---
library_name: transformers
pipeline_tag: any-to-any
tags: [megadual, multimodal, image-generation, image-to-text]
---
# {run.run.name}

A MegaDual model: one autoregressive transformer that reads and writes text and images. Every image position
carries codes of {streams} its DualToken, which is in this folder too.
{llm:,} parameters without the DualToken; {run.model.layers} layers, hidden size {run.model.hidden}.

```python
from PIL import Image
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder", trust_remote_code=True)
image = Image.open("picture.png")
model.draw(["two red apples to the left of a cat, on blue"], cfg_scale=3.0, seed=0)[0].save("drawing.png")
model.edit(image, "make the ground blue", cfg_scale=3.0, image_scale=1.5)[0].save("edited.png")
print(model.describe([image])[0], model.ask([image], "How many cats are there?")[0])
answer = model.interleave([{{"role": "user", "content": [image, "Draw it in red."]}}])  # texts and images
```

A conversation goes on with `{{"role": "assistant", "content": answer}}`; images that were drawn keep their codes.
`AutoProcessor` makes the inputs of `generate` from texts with `<image>` in them, or from chat messages
(`apply_chat_template`); `AutoModelForImageTextToText` and `pipeline("image-text-to-text")` open the folder too.
Images come as PIL images, base64 or `data:` addresses; what messages merely name is opened where the processor is told
so (`allow_addresses=True`, `allow_paths=FOLDER`). A prompt takes at most {run.train.seq_len:,} positions.

## Training
{_training(run, step) if step else "Weights to start a run from; not trained by this project."}
"""


def _training(run: PretrainConfig, step: int) -> str:
    config = dataclasses.asdict(run)
    config = OmegaConf.to_yaml({name: config[name] for name in _TRAINED_BY})
    sets = "\n".join(f"| `{each.path}` | {_counts(each.path)} |" for each in run.data.sets)
    return f"""{step:,} steps of {run.train.steps:,}, each of {run.train.global_batch_tokens:,} positions.

| data (its `manifest.json` names the input files and the filters) | documents | images | positions |
| --- | --- | --- | --- |
{sets}

```yaml
{config}```"""


def _counts(shard_set: str) -> str:
    """Documents, images and image positions of a set as table cells, empty where it is not to be read from here."""
    try:
        manifest = json.loads((Path(shard_set) / "manifest.json").read_text())
    except OSError:
        return " | | "
    return " | ".join(f"{manifest[name]:,}" for name in ("documents", "images", "positions"))
