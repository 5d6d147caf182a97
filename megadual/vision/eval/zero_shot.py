"""Zero-shot classification: classes are named in prompts, and an image is of the class whose prompts are nearest."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from megadual.errors import UserError

from ..siglip import text_embeddings

# The seven prompts that CLIP's authors found to do nearly as well together as all of their eighty.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def read_templates(path: str | Path | None) -> list[str]:
    """One prompt a line, {} where the class name goes; TEMPLATES without a file."""
    if path is None:
        return list(TEMPLATES)
    lines = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    bad = [line for line in lines if line.count("{}") != 1]
    if bad or not lines:
        raise UserError(f"templates file '{path}': each line needs one {{}}, '{bad[0] if bad else ''}' has not")
    return lines


class Classes:
    """The classes of a file: a name a line, or KEY<tab>NAME; the labels of images are keys, names or line numbers."""

    def __init__(self, path: str | Path):
        lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
        if not lines:
            raise UserError(f"classes file '{path}' is empty: it takes one class a line, NAME or KEY<tab>NAME")
        pairs = [line.split("\t", 1) for line in lines]
        self.path, self.names = path, [pair[-1].strip() for pair in pairs]
        self.numbers = {str(i): i for i in range(len(lines))}
        self.numbers |= {name: i for i, name in enumerate(self.names)}
        self.numbers |= {pair[0].strip(): i for i, pair in enumerate(pairs)}

    def number(self, label: str, image: str) -> int:
        if label not in self.numbers:
            raise UserError(f"image '{image}' has the label '{label}', which classes file '{self.path}' does not list")
        return self.numbers[label]


@torch.no_grad()
def class_embeddings(siglip, tokenizer, names: list[str], templates: list[str]) -> Tensor:
    """Unit vectors (classes, P): the mean of the unit embeddings of a class's prompts, made unit length again."""
    means = []
    for name in tqdm(names, desc="classes", unit="class", mininterval=1):
        prompts_TP = text_embeddings(siglip, tokenizer, [template.format(name) for template in templates])
        means.append(F.normalize(prompts_TP, dim=-1).mean(dim=0))
    return F.normalize(torch.stack(means), dim=-1)


def class_logits(pooled_BP: Tensor, classes_KP: Tensor) -> Tensor:
    """100 times the cosine of each image and class, (B, K)."""
    return 100 * F.normalize(pooled_BP, dim=-1) @ classes_KP.T
