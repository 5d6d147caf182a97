"""What the figures of a report are called where people read them: in words, with unit, direction and chance."""

from typing import NamedTuple

HIGHER, LOWER = "higher is better", "lower is better"


class Figure(NamedTuple):
    """`unit` "%" is of a share; `chance` is the figure of the report that guessing comes to."""

    words: str
    unit: str = ""
    better: str = ""
    chance: str | None = None


FIGURES = {
    "n": Figure("images"),
    "psnr": Figure("reconstruction: PSNR, mean over the images", "dB", HIGHER),
    "psnr_mean_image": Figure("PSNR of the training images' mean in the place of each image", "dB", "to be beaten"),
    "ssim": Figure("reconstruction: structural similarity (SSIM), at most 1", "", HIGHER),
    "lpips": Figure("reconstruction: perceptual distance (LPIPS), 0 of equal images", "", LOWER),
    "rfid": Figure("Fréchet distance of the reconstructions to the originals (rFID)", "", LOWER),
    "frechet": Figure("Fréchet distance of the reconstructions to the originals, on features of", "", LOWER),
    "code_usage": Figure("entries of the codebook that are used,", "%", HIGHER),
    "perplexity": Figure("entries that it would take if all were used alike (perplexity),", "", HIGHER),
    "codes": Figure("codes that were counted,"),
    "retrieval_r1": Figure("images whose nearest caption is theirs,", "%", HIGHER, "chance"),
    "retrieval_r1_text_to_image": Figure(
        "captions whose nearest image is theirs,", "%", HIGHER, "chance_text_to_image"
    ),
    "captions": Figure("captions"),
    "chance": Figure("caption of an image guessed", "%"),
    "chance_text_to_image": Figure("image of a caption guessed", "%"),
    "zero_shot_top1": Figure("images whose class comes first,", "%", HIGHER, "zero_shot_chance_top1"),
    "zero_shot_top5": Figure("images whose class is among the first five,", "%", HIGHER, "zero_shot_chance_top5"),
    "zero_shot_chance_top1": Figure("class of an image guessed", "%"),
    "zero_shot_chance_top5": Figure("class of an image guessed with five tries", "%"),
    "zero_shot_images": Figure("images with a label"),
}
OF = {"quantized": "through the codes", "teacher": "SigLIP itself"}


class Row(NamedTuple):
    """A figure as it is shown."""

    name: str
    words: str
    value: str
    better: str


def rows(figures: dict[str, float]) -> list[Row]:
    """A row of each figure. Names that are longer than one of FIGURES end with what it is of: a stream or one of OF."""
    shown = []
    for name, value in figures.items():
        kind = max((known for known in FIGURES if f"{name}_".startswith(f"{known}_")), key=len, default=None)
        figure = FIGURES[kind] if kind else Figure(name)
        of = name[len(kind) + 1 :] if kind else ""
        chance = figures.get(figure.chance) if figure.chance else None
        better = figure.better + ("" if chance is None else f"; chance: {_number(chance, figure.unit)}")
        shown.append(Row(name, f"{figure.words} {OF.get(of, of)}".strip(), _number(value, figure.unit), better))
    return shown


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.2%}".replace("%", " %")
    return (f"{value:,}" if isinstance(value, int) else f"{value:.4g}") + (f" {unit}" if unit else "")
