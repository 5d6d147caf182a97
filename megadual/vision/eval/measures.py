"""What `evaluate.py` measures. A measure sees the data batch by batch and gives its figures at the end.

Shape suffixes: B batch, P pooled width, D code depth, K codebook size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics import nearest, perplexity, psnr, ssim
from ..siglip import text_embeddings
from ..tokenizer import DualToken, Encoded
from .frechet import FeatureStatistics, frechet_distance
from .image_features import through_files
from .samples import Samples
from .zero_shot import Classes, class_logits


@dataclass
class Seen:
    """A batch, what the DualToken made of it, and the teacher's pooled embeddings (B, P) where there is a teacher."""

    samples: Samples
    encoded: Encoded
    reconstructions: Tensor
    teacher_BP: Tensor | None

    @property
    def pooled(self) -> dict[str, Tensor]:
        """Embeddings that images are understood by: the quantised path's and, beside it, the teacher's."""
        return {"quantized": self.encoded.pooled} | ({} if self.teacher_BP is None else {"teacher": self.teacher_BP})


class Reconstruction:
    """PSNR, SSIM and LPIPS of each image. Keeps a few numbers an image."""

    def __init__(self, lpips: Callable[[Tensor, Tensor], Tensor] | None):
        self.functions = {"psnr": psnr, "ssim": ssim} | ({} if lpips is None else {"lpips": lpips})
        self.values: dict[str, list[float]] = {name: [] for name in self.functions}
        self.definitions = {
            "psnr": "dB, per image in [0, 1], mean over the n held-out images",
            "ssim": "Gaussian window of 11, per image in [0, 1], mean over the images",
        }
        if lpips is not None:
            self.definitions["lpips"] = "VGG16, v0.1, mean over the images"

    def update(self, seen: Seen) -> dict[str, list[float]]:
        """The batch's values by name."""
        batch = {name: f(seen.reconstructions, seen.samples.images).tolist() for name, f in self.functions.items()}
        for name, values in batch.items():
            self.values[name] += values
        return batch

    def result(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.values.items()}


class MeanImage:
    """What PSNR comes to when the training images' mean is predicted for every image."""

    definitions = {"psnr_mean_image": "psnr of predicting the training images' mean for every image"}

    def __init__(self, mean: Tensor):
        self.mean, self.sum, self.count = mean, 0.0, 0

    def update(self, seen: Seen) -> None:
        images = seen.samples.images
        self.sum += psnr(self.mean.to(images.device).expand_as(images), images).sum().item()
        self.count += len(images)

    def result(self) -> dict[str, float]:
        return {"psnr_mean_image": self.sum / self.count}


class Frechet:
    """Distance between the sets of originals and of reconstructions. Keeps the features' covariances only."""

    def __init__(self, network, format: str, crop: str):
        self.network, self.format = network, format
        self.sets = {"originals": FeatureStatistics(network.width), "reconstructions": FeatureStatistics(network.width)}
        self.definitions = {network.key: f"{network.about}; images: {crop}, both sets as {format} files"}

    def update(self, seen: Seen) -> None:
        self.sets["originals"].update(self.network(through_files(seen.samples.images, self.format)))
        self.sets["reconstructions"].update(self.network(through_files(seen.reconstructions, self.format)))

    def result(self) -> dict[str, float]:
        return {self.network.key: frechet_distance(*self.sets.values())}


class CodeUsage:
    """Streams differ in their sizes, and in having one codebook for all depths or one for each."""

    def __init__(self, model: DualToken):
        self.config = model.config
        self.counts_DK = {
            name: torch.zeros(stream.depth, stream.codebook_size, dtype=torch.int64)
            for name, stream in self.config.streams.items()
        }
        self.definitions = {
            "code_usage": "share of a codebook's entries used at least once, over all held-out images",
            "perplexity": "exp of the entropy of a codebook's codes; where each depth has a codebook of its own, both "
            "are means over depths",
        }

    def update(self, seen: Seen) -> None:
        for stream, counts_DK in self.counts_DK.items():
            for depth, codes in enumerate(seen.encoded.codes[stream].flatten(0, 2).unbind(dim=-1)):
                counts_DK[depth] += torch.bincount(codes, minlength=counts_DK.shape[1]).cpu()

    def result(self) -> dict[str, float]:
        report = {}
        for stream, counts_DK in self.counts_DK.items():
            shared = self.config.streams[stream].shared_codebook
            books = counts_DK.sum(dim=0, keepdim=True) if shared else counts_DK
            report[f"code_usage_{stream}"] = (books > 0).float().mean().item()
            report[f"perplexity_{stream}"] = sum(perplexity(counts_K.double()) for counts_K in books) / len(books)
            report[f"codes_{stream}"] = counts_DK.sum().item()
        return report


class Retrieval:
    """R@1 between images and captions, among the images that have any. Keeps the embeddings: 4 P bytes each."""

    nothing = {"retrieval": "no image has a caption"}
    definitions = {
        "retrieval_r1": "images whose nearest caption, among all, is one of theirs; quantized: through codes, "
        "teacher: SigLIP itself",
        "retrieval_r1_text_to_image": "captions whose nearest image, among all with a caption, is theirs",
        "chance": "R@1 of guessing a caption, where each image has one; text_to_image: of guessing an image",
    }

    def __init__(self, siglip, tokenizer):
        self.siglip, self.tokenizer = siglip, tokenizer
        self.captions: list[list[str]] = []  # of each image
        self.embeddings: dict[str, list[Tensor]] = {"texts": []}

    def update(self, seen: Seen) -> None:
        captions = [caption.splitlines() for caption in seen.samples.captions]
        with_caption = [i for i, lines in enumerate(captions) if lines]
        if not with_caption:
            return
        self.captions += [captions[i] for i in with_caption]
        texts = [line for i in with_caption for line in captions[i]]
        self.embeddings["texts"].append(text_embeddings(self.siglip, self.tokenizer, texts).cpu())
        for name, pooled_BP in seen.pooled.items():
            self.embeddings.setdefault(name, []).append(pooled_BP[with_caption].cpu())

    def result(self) -> dict[str, float]:
        """Empty where no image has a caption. Captions that read the same count as one."""
        if not self.captions:
            return {}
        embeddings = {name: torch.cat(parts) for name, parts in self.embeddings.items()}
        texts_MP, texts = embeddings.pop("texts"), [line for lines in self.captions for line in lines]
        report = {}
        for name, images_NP in embeddings.items():
            found = [texts[i] in lines for lines, i in zip(self.captions, nearest(images_NP, texts_MP), strict=True)]
            report[f"retrieval_r1_{name}"] = sum(found) / len(found)
            found = [text in self.captions[i] for text, i in zip(texts, nearest(texts_MP, images_NP), strict=True)]
            report[f"retrieval_r1_text_to_image_{name}"] = sum(found) / len(found)
        chance = {"chance": 1 / len(texts), "chance_text_to_image": 1 / len(self.captions)}
        return report | {"captions": len(texts)} | chance


class ZeroShot:
    """Accuracy of classification by prompts, over the images whose label can be read."""

    nothing = {"zero_shot": "no image has a label that can be read"}

    def __init__(self, classes: Classes, classes_KP: Tensor, templates: list[str]):
        self.classes, self.classes_KP = classes, classes_KP
        self.correct: dict[str, int] = {}
        self.count = 0
        self.definitions = {
            "zero_shot": f"share of images whose class has the largest 100 cos, {len(classes.names)} classes, "
            f"{len(templates)} prompts each; top5: among the five largest"
        }

    def update(self, seen: Seen) -> None:
        samples = seen.samples
        labelled = [i for i, label in enumerate(samples.labels) if label is not None]
        wanted = [self.classes.number(samples.labels[i], samples.names[i]) for i in labelled]
        wanted_B1 = torch.tensor(wanted, device=self.classes_KP.device)[:, None]
        self.count += len(wanted)
        for name, pooled_BP in seen.pooled.items():
            best = class_logits(pooled_BP[labelled], self.classes_KP).topk(min(5, len(self.classes.names))).indices
            for key, hits in {"top1": best[:, :1] == wanted_B1, "top5": best == wanted_B1}.items():
                key = f"zero_shot_{key}_{name}"
                self.correct[key] = self.correct.get(key, 0) + hits.any(dim=1).sum().item()

    def result(self) -> dict[str, float]:
        """Empty where no label can be read."""
        if not self.count:
            return {}
        count = len(self.classes.names)
        chance = {f"zero_shot_chance_top{tries}": min(1, tries / count) for tries in (1, 5)}
        found = {name: correct / self.count for name, correct in self.correct.items()}
        return found | chance | {"zero_shot_images": self.count}
