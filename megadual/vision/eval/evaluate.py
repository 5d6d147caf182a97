"""How well a DualToken reconstructs and understands held-out images.

    python -m megadual.vision.eval --model DIR --siglip DIR --data 'heldout-*.tar' --output DIR

Reads a folder of images or webdataset tars once and writes report.json, report.html (reconstructions, the worst
first) and grids of them. Always: PSNR, SSIM, LPIPS, a Fréchet distance (rFID where the Inception weights are), use of
the codes. With a SigLIP and captions: retrieval both ways. With a SigLIP and --classes: zero-shot classification.
What is left out is listed in the report with the reason. Memory does not grow with the images but for the embeddings
of captioned ones (3 x 4 bytes x their width) and a few numbers each: 0.7 GB at 50,000 of SigLIP-So400m's.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from megadual.errors import UserError, command

from ..lpips import LPIPS
from ..siglip import image_embeddings, load_siglip, load_tokenizer
from ..tokenizer import DualToken
from .gallery import Gallery
from .image_features import FORMATS, feature_network
from .measures import CodeUsage, Frechet, MeanImage, Reconstruction, Retrieval, Seen, ZeroShot
from .samples import batches
from .zero_shot import Classes, class_embeddings, read_templates


@dataclass
class Options:
    """The command's arguments; `main` says what they mean."""

    model: str
    data: str
    output: Path
    siglip: str | None = None
    train_data: str | None = None
    classes: Path | None = None
    templates: Path | None = None
    inception: Path | None = None
    format: str = "png"
    batch_size: int = 64
    workers: int = 0
    limit: int | None = None
    pictures: int = 512
    device: str = "cpu"


def load_dualtoken(folder: str | Path) -> DualToken:
    try:
        return DualToken.from_pretrained(folder)
    except ValueError as error:
        raise UserError(str(error)) from error


def mean_image(source: str, size: int, batch_size: int, workers: int) -> torch.Tensor:
    """(1, 3, size, size), of all of a source's images."""
    total, count = torch.zeros(1, 3, size, size), 0
    for samples, _ in batches(source, size, batch_size, workers, progress="mean image"):
        if samples:
            total += samples.images.sum(dim=0, keepdim=True)
            count += len(samples.images)
    return total / count


class Evaluation:
    """The models and measures that the options ask for; `left_out` tells what could not be measured, and why."""

    def __init__(self, options: Options):
        self.options, self.left_out = options, {}
        self.device = torch.device(options.device)
        self.model = load_dualtoken(options.model).to(self.device)
        size = self.model.config.image_size
        if not self.model.config.feeding("picture"):
            raise UserError(
                f"--model '{options.model}': no stream feeds a picture decoder, so nothing is reconstructed"
            )
        self.siglip = load_siglip(options.siglip).to(self.device) if options.siglip else None
        try:
            lpips = LPIPS().to(self.device)
        except UserError as error:
            lpips, self.left_out["lpips"] = None, str(error)
        self.reconstruction = Reconstruction(lpips)
        network, why_not = feature_network(options.inception, size, self.device)
        if why_not:
            self.left_out["rfid"] = why_not
        crop = f"shortest side to {size} px (PIL, bicubic), central square"
        self.measures = [Frechet(network, options.format, crop), CodeUsage(self.model)]
        if options.train_data:
            mean = mean_image(options.train_data, size, options.batch_size, options.workers)
            self.measures.append(MeanImage(mean))
        taught = self.model.config.teacher_layer is not None
        if self.siglip and taught:
            self._add_text_measures()
        else:
            why = "no --siglip was given" if taught else "no stream feeds the teacher: there is no image embedding"
            self.left_out |= {name: why for name in ("retrieval", "zero_shot")}
        self.gallery = Gallery(options.pictures)

    def _add_text_measures(self) -> None:
        tokenizer = load_tokenizer(self.options.siglip)
        self.measures.append(Retrieval(self.siglip, tokenizer))
        if self.options.classes:
            classes, templates = Classes(self.options.classes), read_templates(self.options.templates)
            embeddings = class_embeddings(self.siglip, tokenizer, classes.names, templates)
            self.measures.append(ZeroShot(classes, embeddings, templates))
        else:
            self.left_out["zero_shot"] = "no --classes was given"

    def _reconstruct(self, codes: dict[str, torch.Tensor]) -> torch.Tensor:
        """Decoded images at the originals' size; a decoder may be built for another."""
        images, size = self.model.decode(codes), self.model.config.image_size
        if images.shape[-1] == size:
            return images
        return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)

    @torch.no_grad()
    def run(self) -> dict:
        """One pass over the data; returns the report and writes nothing."""
        options, unreadable = self.options, []
        size = self.model.config.image_size
        for samples, bad in batches(options.data, size, options.batch_size, options.workers, options.limit):
            unreadable += bad
            if samples is None:
                continue
            samples.images = samples.images.to(self.device)
            encoded = self.model.encode(samples.images)
            teacher = image_embeddings(self.siglip, samples.images) if self.siglip else None
            seen = Seen(samples, encoded, self._reconstruct(encoded.codes), teacher)
            self.gallery.update(seen, self.reconstruction.update(seen))
            for measure in self.measures:
                measure.update(seen)
        if self.gallery.seen < 2:
            raise UserError(f"'{options.data}' holds {self.gallery.seen} readable images, at least 2 are needed")
        figures, definitions = {}, {}
        if self.model.config.output_size != size:
            definitions["reconstructions"] = (
                f"decoded at {self.model.config.output_size} px, resized (bicubic) to {size}"
            )
        for measure in (self.reconstruction, *self.measures):
            found = measure.result()
            figures |= found
            definitions |= measure.definitions if found else {}
            if not found:
                self.left_out |= measure.nothing
        return {
            "n": self.gallery.seen,
            **figures,
            "fingerprint": self.model.fingerprint(),
            "unreadable": unreadable,
            "left_out": self.left_out,
            "definitions": definitions,
        }


def evaluate(options: Options) -> dict:
    """Measure and write; returns the report, whose `definitions` say what each number is taken over."""
    evaluation = Evaluation(options)
    report = evaluation.run()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    evaluation.gallery.write(options.output, report)
    return report


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="DualToken folder")
    add("--data", required=True, help="held-out images: a folder, or a glob pattern of webdataset tars")
    add("--output", type=Path, required=True, help="folder for the report")
    add("--siglip", help="the teacher's folder, with its text tokenizer; without it nothing of text is measured")
    add("--train-data", help="training images, to tell the PSNR of predicting their mean image")
    add("--classes", type=Path, help="class names, one a line as NAME or KEY<tab>NAME; images carry the key, the "
        "name or the line's number (from 0) as their folder's name, .cls member or `label` in .json")  # fmt: skip
    add("--templates", type=Path, help="prompts, one a line with {} for the class name (default: CLIP's short list)")
    add("--inception", type=Path, help="TorchScript file of FID's Inception (default: where clean-fid keeps it)")
    add("--format", choices=FORMATS, default="png", help="files that both sets pass before the Fréchet distance; the "
        "authors' figures are on jpeg (quality 95, OpenCV's default)")  # fmt: skip
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=0, help="processes that decode images")
    add("--limit", type=int, help="images that are read at most")
    add("--pictures", type=int, default=512, help="images that are shown, those of the lowest PSNR")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    report = evaluate(Options(**vars(parser.parse_args(argv))))
    print(", ".join(f"{name} {value:.6g}" for name, value in report.items() if isinstance(value, int | float)))
    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}")
    if unreadable := report["unreadable"]:
        print(f"unreadable: {len(unreadable)}, listed in report.json; the first: {unreadable[0]}")
