"""From text, images and chat messages to what the exported model takes."""

import io
import os
from urllib.request import urlopen

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from megadual.streams import IMAGE
from megadual.vision.tokenizer import centre_crop, to_tensor

IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # Qwen's marks around a message
ADDRESSES = ("http://", "https://", "data:")

_CONTENT = f"""{{%- if message['content'] is string -%}}{{{{ message['content'] }}}}{{%- else -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'image' -%}}{IMAGE}{{%- else -%}}{{{{ part['text'] }}}}{{%- endif -%}}
{{%- endfor -%}}{{%- endif -%}}"""
# A tokenizer without Qwen's marks belongs to a model that has seen documents only: messages are one document.
DOCUMENT_TEMPLATE = f"{{%- for message in messages -%}}{_CONTENT}{{%- endfor -%}}"
CHAT_TEMPLATE = (
    f"{{%- for message in messages -%}}{{{{ '{IM_START}' + message['role'] + '\\n' }}}}{_CONTENT}"
    f"{{{{ '{IM_END}\\n' }}}}{{%- endfor -%}}"
    f"{{%- if add_generation_prompt -%}}{{{{ '{IM_START}assistant\\n' }}}}{{%- endif -%}}"
)


class MegaDualProcessor(ProcessorMixin):
    """Text with `<image>` where an image is looked at, and the images in that order; or chat messages.

    image_size is the side of a DualToken's images, image_positions the positions that one takes. Without
    `chat_template`, Qwen's is taken where the tokenizer has its marks, else messages are written one after another.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, image_size: int = 256, image_positions: int = 256, chat_template=None, **kwargs):
        self.image_size, self.image_positions = image_size, image_positions
        own = CHAT_TEMPLATE if IM_START in tokenizer.get_vocab() else DOCUMENT_TEMPLATE
        super().__init__(tokenizer, chat_template=chat_template or own)
        tokenizer.padding_side = "left"  # generation goes on at the right

    def __call__(
        self, text: str | list[str] | None = None, images=None, return_tensors: str = "pt", **kwargs
    ) -> BatchFeature:
        """input_ids and attention_mask (B, S), left-padded, and pixel_values (I, 3, h, w) in [-1, 1].

        `images` is an image (PIL, path, address or base64), or a list, nested or not; without text each image is a
        sequence of its own. ValueError where the texts' `<image>`s and the images do not count the same.
        """
        images = _flat(images)
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

    def apply_chat_template(self, conversation: list, *args, **kwargs):
        """As transformers' own; a message's content may be a text, which transformers 4 does not take."""
        many = bool(conversation) and isinstance(conversation[0], (list, tuple))
        spelt = [[_spelt(message) for message in messages] for messages in (conversation if many else [conversation])]
        return super().apply_chat_template(spelt if many else spelt[0], *args, **kwargs)

    def prompt(self, prompt: str | list[dict], images: list[Image.Image] | None = None) -> BatchFeature:
        """The inputs of one text with its images, or of chat messages that the model is to answer.

        Messages are {"role": ..., "content": text or parts}, a part {"type": "text", "text": ...} or
        {"type": "image"}, whose image stands there under "image", "path" or "url" or comes next in `images`.
        """
        if isinstance(prompt, str):
            return self(text=prompt, images=images)
        waiting = _flat(images)
        messages = [message | {"content": _filled(message["content"], waiting)} for message in prompt]
        if waiting:
            raise ValueError(f"the messages have no place for {len(waiting)} of the images")
        return self.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)


def _spelt(message: dict) -> dict:
    """A message whose content is a list of parts."""
    content = message["content"]
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _flat(images) -> list[Image.Image]:
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in _flat(entry)]
    return [] if images is None else [_open(images)]


def _open(image: Image.Image | str) -> Image.Image:
    """An image, or the one in a file, at an address or in base64; ValueError where there is none.

    As it is stored: transformers' load_image would put what is transparent on black.
    """
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, str):
        raise TypeError(f"an image is a PIL image, a path, an address or base64, not {type(image).__name__}")
    if os.path.isfile(image):
        return Image.open(image)
    address = image if image.startswith(ADDRESSES) else f"data:;base64,{image}"
    try:
        with urlopen(address) as stream:
            return Image.open(io.BytesIO(stream.read()))
    except (OSError, ValueError) as error:
        raise ValueError(f"'{image[:200]}' is no image file, address or base64 of an image: {error}") from error


def _filled(content: str | list[dict], waiting: list[Image.Image]) -> str | list[dict]:
    """A message's content, its image parts without an image given one of `waiting`, which is used up."""
    if isinstance(content, str):
        return content
    bare = {"type": "image"}
    return [bare | {"image": waiting.pop(0)} if part == bare and waiting else part for part in content]
