"""Edits: conversations in which the user gives an image and an instruction, and the assistant draws."""

import hashlib
from typing import Any

from data_pipeline.documents import RawDocument, Unusable
from data_pipeline.formats.conversations import Said, conversation
from data_pipeline.formats.sample import Sample, text
from megadual.streams import Role

COLUMNS = (  # source, instruction or several for the same edit, target
    ("original_image", "edit_prompt", "edited_image"),  # InstructPix2Pix
    ("src_img", "edited_prompt_list", "edited_img"),  # OmniEdit
)


def is_edit(sample: Sample) -> bool:
    return _columns(sample) is not None


def read_edit(sample: Sample) -> RawDocument:
    columns = _columns(sample)
    if columns is None:
        raise Unusable("no edit: the sample has none of " + ", ".join(" + ".join(names) for names in COLUMNS))
    source, instruction, target = (sample.get(name) for name in columns)
    return _edits(sample, [source, target], [instruction])


def _columns(sample: Sample) -> tuple[str, str, str] | None:
    return next((names for names in COLUMNS if all(sample.get(name) is not None for name in names)), None)


def is_edit_list(sample: Sample) -> bool:
    return all(isinstance(sample.fields.get(name), list) for name in ("image_list", "instruction_list"))


def read_edit_list(sample: Sample) -> RawDocument:
    """BAGEL's: every image of `image_list` is edited into the next one, by one of the entry's instructions."""
    images, instructions = sample.entries("image_list"), sample.entries("instruction_list")
    if len(images) != len(instructions) + 1 or not instructions:
        raise Unusable(f"{len(instructions)} entries of instructions for {len(images)} images; one less is needed")
    return _edits(sample, images, instructions)


def _edits(sample: Sample, images: list, instructions: list) -> RawDocument:
    """The first image is looked at; what one step draws is there for the next."""
    drawn = [sample.image(value) for value in images]
    said: list[Said] = []
    for step, instruction in enumerate(instructions):
        asked = _one_of(instruction, f"{sample.key} {step}")
        said += [(Role.USER, drawn[:1] * (step == 0) + [asked]), (Role.ASSISTANT, [drawn[step + 1]])]
    return conversation(sample, said)


def _one_of(instruction: Any, seed: str) -> str:
    """Of several instructions for one edit one that the sample's key decides, so that all of them are learned."""
    several = instruction if isinstance(instruction, list) else [instruction]
    spelt = [text(value, "instruction", blank=True) for value in several]
    spelt = [value for value in spelt if value.strip()]
    if not spelt:
        raise Unusable("the instruction is empty")
    return spelt[int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest()) % len(spelt)]
