"""From text and images to what the exported model takes."""

import torch
from transformers import BatchFeature, ProcessorMixin

from megadual.streams import IMAGE
from megadual.vision.tokenizer import centre_crop, to_tensor


class MegaDualProcessor(ProcessorMixin):
    """Text with `<image>` where an image is looked at, and the images in that order.

    image_size is the side of a DualToken's images, image_positions the positions that one takes.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, image_size: int = 256, image_positions: int = 256, chat_template=None, **kwargs):
        self.image_size, self.image_positions = image_size, image_positions
        super().__init__(tokenizer, chat_template=chat_template)
        tokenizer.padding_side = "left"  # generation goes on at the right

    def __call__(self, text: str | list[str] | None = None, images=None, return_tensors: str = "pt") -> BatchFeature:
        """input_ids and attention_mask (B, S), left-padded, and pixel_values (I, 3, h, w) in [-1, 1].

        `images` is an image or a list; without text each image is a sequence of its own. ValueError where the
        texts' `<image>`s and the images do not count the same.
        """
        images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        text = [IMAGE] * len(images) if text is None else [text] if isinstance(text, str) else list(text)
        marks = sum(t.count(IMAGE) for t in text)
        if marks != len(images):
            raise ValueError(f"the text has {marks} {IMAGE} marks for {len(images)} images")
        shown = f"<image_start>{IMAGE * self.image_positions}<image_end>"
        inputs = self.tokenizer(
            [t.replace(IMAGE, shown) for t in text],
            add_special_tokens=False,
            padding=True,
            return_token_type_ids=False,
            return_tensors=return_tensors,
        )
        if images:
            inputs["pixel_values"] = torch.stack([to_tensor(centre_crop(image, self.image_size)) for image in images])
        return BatchFeature(dict(inputs))

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)
