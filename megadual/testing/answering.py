"""An exported folder whose model has learned to answer a little, for tests of harnesses."""

import random
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints_tools import convert_to_hf
from megadual.hf.folder import open_folder
from megadual.hf.modeling_megadual import IGNORE, MegaDualForCausalLM
from megadual.testing.checkpoints import train_and_save
from megadual.testing.distributed import run_distributed
from megadual.testing.models import write_run

Sample = tuple[Image.Image, str, str]  # an image, what is asked about it, the answer


def write_trained_export(folder: Path) -> Path:
    """What convert_to_hf.py writes of a run of two steps, in `folder`/hf."""
    run = write_run(folder, "train.seq_len=512", "train.global_batch_tokens=512")
    run_distributed(train_and_save, 1, run)
    convert_to_hf.main(["--checkpoint", run.run.dir, "--output", str(folder / "hf")])
    return folder / "hf"


def teach(folder: Path, samples: list[Sample], steps: int, batch: int = 16, seed: int = 0) -> list[float]:
    """Train the LLM of an export on the answers of samples, write its weights into the folder; the losses."""
    model = open_folder(folder, "cpu")
    learned = [*model.model.parameters(), *model.projector.parameters(), *model.lm_head.parameters()]
    optimizer, rng, losses = torch.optim.AdamW(learned, lr=3e-3), random.Random(seed), []
    for _ in range(steps):
        conversations = [
            [{"role": "user", "content": [image, asked]}, {"role": "assistant", "content": answer}]
            for image, asked, answer in rng.sample(samples, batch)
        ]
        inputs = model.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        answered = torch.as_tensor(inputs.pop("assistant_masks")).bool()
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(~answered, IGNORE)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    _write(model, folder)
    return losses


@torch.no_grad()
def balance(folder: Path, samples: list[Sample]) -> None:
    """Move the text head so that over the samples, which have few different answers, each answer is given as often.

    What was learned in a few steps is which answers there are; one of them is then the likeliest to every question.
    Balanced, the answer depends on the question.
    """
    model = open_folder(folder, "cpu")
    inputs = model.processor.prompt([[{"role": "user", "content": [image, asked]}] for image, asked, _ in samples])
    hidden_BH = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
    first = sorted({model.tokenizer(answer).input_ids[0] for _, _, answer in samples})
    logits_BT = hidden_BH @ model.lm_head.weight[first].T
    along_H = hidden_BH.mean(0) / hidden_BH.mean(0).square().sum()
    moved_T = torch.zeros(len(first))
    for _ in range(1000):
        likeliest_B = (logits_BT - torch.outer(hidden_BH @ along_H, moved_T)).argmax(1)
        share_T = torch.bincount(likeliest_B, minlength=len(first)) / len(samples)
        moved_T += 0.02 * (share_T - 1 / len(first))
    model.lm_head.weight[first] -= torch.outer(moved_T, along_H)
    _write(model, folder)


def _write(model: MegaDualForCausalLM, folder: Path) -> None:
    weights, tensors = folder / "model.safetensors", model.state_dict()
    save_file({name: tensors[name].contiguous() for name in load_file(weights)}, weights, metadata={"format": "pt"})
