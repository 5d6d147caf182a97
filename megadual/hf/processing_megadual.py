"""From text, images and chat messages to what the exported model takes."""

import os
import re
import reprlib
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from megadual.hf.drawn_codes import kept_codes
from megadual.images import ADDRESSES, from_base64, read_address, read_image
from megadual.streams import END_OF_TEXT, IM_END, IM_START, IMAGE, SPECIAL_TOKENS
from megadual.vision.tokenizer import centre_crop, to_tensor

SHOWN, DRAWN = ("<image_start>", "<image_end>"), ("<image_gen_start>", "<image_gen_end>")  # around images
ROLES = ("system", "user", "assistant", "tool")

# What the assistant says has a loss in training, with its end mark: `return_assistant_tokens_mask` marks it.
# Its images are those that it drew.
CHAT_TEMPLATE = f"""\
{{%- macro said(message) -%}}
    {{%- if message['content'] is string -%}}
        {{{{- message['content'] | trim -}}}}
    {{%- else -%}}
        {{%- for part in message['content'] -%}}
            {{%- if part['type'] != 'image' -%}}
                {{{{- part['text'] -}}}}
            {{%- elif message['role'] == 'assistant' -%}}
                {{{{- '{DRAWN[0]}{IMAGE}{DRAWN[1]}' -}}}}
            {{%- else -%}}
                {{{{- '{IMAGE}' -}}}}
            {{%- endif -%}}
        {{%- endfor -%}}
    {{%- endif -%}}
    {{{{- '{IM_END}' -}}}}
{{%- endmacro -%}}
{{%- for message in messages -%}}
    {{{{- '{IM_START}' + message['role'] + '\\n' -}}}}
    {{%- if message['role'] == 'assistant' -%}}
        {{%- generation -%}}{{{{- said(message) -}}}}{{%- endgeneration -%}}
    {{%- else -%}}
        {{{{- said(message) -}}}}
    {{%- endif -%}}
    {{{{- '\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '{IM_START}assistant\\n' -}}}}{{%- endif -%}}"""

JOINER = "\u2060"  # the word joiner: not seen, and no blank
_NAMES = "|".join(re.escape(token.removeprefix("<")) for token in SPECIAL_TOKENS)
_SPELT = re.compile(f"<({JOINER}*)({_NAMES})")
_ESCAPED = re.compile(f"<{JOINER}({JOINER}*)({_NAMES})")
# What is tokenized apart in a prompt: special tokens, and who speaks.
_MARK = re.compile(f"<(?:{_NAMES})|(?<={re.escape(IM_START)})[^<\n]*\n")


def escaped(text: str) -> str:
    """`text` as it stands in a prompt whose special tokens have their meaning: those spelled in it stay text.

    A word joiner behind their first character says so; where joiners are there already, one more.
    """
    return _SPELT.sub(rf"<{JOINER}\1\2", text)


def checked(text: str) -> str:
    """`text`; ValueError where it holds halves of characters, as bytes do that were read as text and are none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text holds U+{ord(text[error.start]):04X}, which is no character") from None
    return text


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(r"<\1\2", text)


class MegaDualProcessor(ProcessorMixin):
    """Text with `<image>` where an image is looked at, and the images in that order; or chat messages.

    image_size is the side of a DualToken's images, image_positions the positions that one takes. An image that was
    drawn with the codes of `streams` of the DualToken with the fingerprint `dualtoken` is given as these codes.

    Messages may come from anyone, so what they name is opened only where the caller allows it, here, as an attribute
    or in a call: `allow_addresses` for http and https, `allow_paths` for files, True or the folder that they are in.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer=None,
        image_size: int = 256,
        image_positions: int = 256,
        dualtoken: str | None = None,
        streams: list[str] | None = None,
        chat_template: str | None = None,
        allow_addresses: bool = False,
        allow_paths: bool | str | Path = False,
        **kwargs,
    ):
        self.image_size, self.image_positions = image_size, image_positions
        self.dualtoken, self.streams = dualtoken, streams or []
        self.allow_addresses, self.allow_paths = allow_addresses, allow_paths
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        tokenizer.padding_side = "left"  # generation goes on at the right

    def __call__(
        self,
        text: str | list[str] | None = None,
        images=None,
        return_tensors: str | None = "pt",
        return_offsets_mapping: bool = False,
        allow_addresses: bool | None = None,
        allow_paths: bool | str | Path | None = None,
        **kwargs,
    ) -> BatchFeature:
        """input_ids and attention_mask (B, S), left-padded, and the images, in order.

        `text` is a prompt: special tokens in it have their meaning but where `escaped` spelled them. An image stands
        as `<image>` where it is looked at, as `<image_gen_start><image><image_gen_end>` where the model drew it.
        `images` is an image (PIL, base64, a data: address; an address or path where these are allowed), or a list,
        nested or not; without text each image is a sequence of its own. ValueError where the texts' `<image>`s and the
        images do not count the same, or an image can't be had.

        pixel_values (P, 3, h, w) in [-1, 1] are those of the images without codes. Where any has codes, image_codes
        (I, N, all streams' depths) are those of all images, -1 for the ones that come as pixels.
        """
        images = self._opened(images, allow_addresses, allow_paths)
        text = [IMAGE] * len(images) if text is None else [text] if isinstance(text, str) else list(text)
        sequences = [_pieces(checked(prompt)) for prompt in text]
        marks = sum(piece == IMAGE for pieces in sequences for _, piece in pieces)
        if marks != len(images):
            raise ValueError(f"the text has {marks} {IMAGE} marks for {len(images)} images")
        rows = [self._tokens(pieces) for pieces in sequences]
        longest = max(len(ids) for ids, _ in rows)
        padding, padded = [longest - len(ids) for ids, _ in rows], self.tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        inputs = {
            "input_ids": [[padded] * pad + ids for pad, (ids, _) in zip(padding, rows, strict=True)],
            "attention_mask": [[0] * pad + [1] * (longest - pad) for pad in padding],
        }
        features = BatchFeature(inputs, tensor_type=return_tensors)
        if return_offsets_mapping:  # as they are: those who ask for them go through them one by one
            features["offset_mapping"] = [[(0, 0)] * pad + at for pad, (_, at) in zip(padding, rows, strict=True)]
        features.update(self._seen(images))
        return features

    def _tokens(self, pieces: list[tuple[int, str]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a prompt's pieces, and where in the prompt each token stands. Texts are tokenized one by one."""
        special = dict(zip(SPECIAL_TOKENS, self.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
        texts = [_unescaped(piece) for _, piece in pieces if piece not in special]
        encoded = self.tokenizer(
            texts or [""], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        tokenized = zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        before = None
        for start, piece in pieces:
            if piece in special:
                found = [special[piece]]
                if piece == IMAGE:
                    found *= self.image_positions
                    if before not in (SHOWN[0], DRAWN[0]):
                        found = [special[SHOWN[0]], *found, special[SHOWN[1]]]
                at = [(start, start + len(piece))] * len(found)
            else:
                found, offsets = next(tokenized)
                at = _places(start, piece, offsets)
            ids, places, before = ids + found, places + at, piece
        return ids, places

    def _opened(
        self, images, allow_addresses: bool | None = None, allow_paths: bool | str | Path | None = None
    ) -> list:
        """The images, in order; what is None is as the processor allows it."""
        addresses = self.allow_addresses if allow_addresses is None else allow_addresses
        paths = self.allow_paths if allow_paths is None else allow_paths
        return [_open(image, addresses, paths) for image in _flat(images)]

    def to_dict(self, *args, **kwargs) -> dict:
        """What is saved: not what a caller allows, who is another one wherever the folder is opened."""
        allowed = ("allow_addresses", "allow_paths")
        return {name: value for name, value in super().to_dict(*args, **kwargs).items() if name not in allowed}

    def _seen(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        kept = [kept_codes(image, self.dualtoken, self.streams) for image in images]
        pixels = [image for image, codes in zip(images, kept, strict=True) if codes is None]
        seen = {}
        if pixels:
            seen["pixel_values"] = torch.stack([to_tensor(centre_crop(image, self.image_size)) for image in pixels])
        some = next((codes for codes in kept if codes is not None), None)
        if some is not None:
            none = torch.full_like(some, -1)
            seen["image_codes"] = torch.stack([none if codes is None else codes for codes in kept])
        return seen

    def apply_chat_template(self, conversation: list, *args, **kwargs):
        """As transformers' own, on messages whose content is a text or parts, as `prompt` takes them.

        Special tokens spelled in them stay text, also where the prompt (`tokenize=False`) is given to the processor.
        """
        kwargs.pop("sanitize_control_tokens", None)  # which asks for just that
        many = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = [
            [_spelt(message) for message in messages] for messages in (conversation if many else [conversation])
        ]
        return super().apply_chat_template(conversations if many else conversations[0], *args, **kwargs)

    def prompt(self, messages: list[dict] | list[list[dict]], images: list[Image.Image] | None = None) -> BatchFeature:
        """The inputs of chat messages that the model is to answer, or of several conversations.

        Messages are {"role": ..., "content": a text, or a list of parts}. A part is a text, an image,
        {"type": "text", "text": ...} or {"type": "image"}, whose image stands there under "image", "path" or "url" or
        comes next in `images`.
        """
        if not messages:
            raise ValueError("there are no messages")
        waiting = self._opened(images)

        def filled(conversation: list[dict]) -> list[dict]:
            return [message | {"content": _filled(message.get("content"), waiting)} for message in conversation]

        whole = [filled(each) for each in messages] if isinstance(messages[0], list) else filled(messages)
        if waiting:
            raise ValueError(f"the messages have no place for {len(waiting)} of the images")
        return self.apply_chat_template(
            whole, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    @cached_property
    def user_header(self) -> list[int]:
        """Ids of the marks that begin a user's turn."""
        return self(text=f"{IM_START}user\n", return_tensors=None)["input_ids"][0]

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)


def _pieces(prompt: str) -> list[tuple[int, str]]:
    """Where each piece of a prompt starts, and the piece: a special token, who speaks, or the text between them."""
    pieces, end = [], 0
    for mark in _MARK.finditer(prompt):
        pieces += [(end, prompt[end : mark.start()]), (mark.start(), mark[0])]
        end = mark.end()
    return [(start, piece) for start, piece in [*pieces, (end, prompt[end:])] if piece]


def _places(start: int, piece: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where the tokens of an escaped piece stand in the prompt.

    `offsets` are those in the text that is meant, without the blanks before and behind a token where the tokenizer
    leaves them out: here they belong to the token behind them, so that none is empty.
    """
    joiners = {match.start() + 1 for match in _ESCAPED.finditer(piece)}
    place = [start + i for i in range(len(piece) + 1) if i not in joiners]
    places, end = [], 0
    for first, last in offsets:
        first, end = min(first, end), max(last, end)
        places.append((place[first], place[end]))
    return places


def _part(part: str | dict | Image.Image) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Image.Image):
        return {"type": "image", "image": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image_url":  # OpenAI's
        url = part["image_url"]
        return {"type": "image", "url": url if isinstance(url, str) else url["url"]}
    if kind == "image" or kind == "text" and isinstance(part.get("text"), str):
        return part
    raise ValueError(f"a message has the part {reprlib.repr(part)}; parts are texts and images")


def _spelt(message: dict) -> dict:
    """A message as the template takes it: as a list of parts, without blanks where its text begins and ends.

    ValueError for other roles and for other parts than texts and images: transformers would open a sound's address by
    itself, and a role stands in the prompt as it is.
    """
    if message.get("role") not in ROLES:
        raise ValueError(f"a message has the role {reprlib.repr(message.get('role'))}; roles are {', '.join(ROLES)}")
    content = message.get("content") or ""
    parts: list[dict] = []
    for part in map(_part, content if isinstance(content, (list, tuple)) else [content]):
        if part["type"] == "text" and parts and parts[-1]["type"] == "text":
            parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
        else:
            parts.append(dict(part))
    texts = [part for part in parts if part["type"] == "text"]
    if texts:
        texts[0]["text"] = texts[0]["text"].lstrip()
        texts[-1]["text"] = texts[-1]["text"].rstrip()
    for part in texts:
        part["text"] = escaped(part["text"])
    return {**message, "content": parts}


def _flat(images) -> list:
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in _flat(entry)]
    return [] if images is None else [images]


def _open(image: Image.Image | str | Path, addresses: bool, paths: bool | str | Path) -> Image.Image:
    """An image, or the one at an address, in a file or in base64; ValueError where there is none, or it is not allowed.

    As it is stored: transformers' load_image would put what is transparent on black.
    """
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, Path)):
        raise TypeError(f"an image is a PIL image, a path, an address or base64, not {type(image).__name__}")
    text = str(image)
    shown = f"'{text[:80]}{'...' if len(text) > 80 else ''}'"
    try:
        if text.lower().startswith(ADDRESSES):
            if not addresses:
                raise ValueError("addresses are not opened (the processor's allow_addresses=True lets them)")
            return read_image(read_address(text))
        if text[:5].lower() != "data:" and paths and os.path.isfile(text):
            if paths is not True and not Path(text).resolve().is_relative_to(Path(paths).resolve()):
                raise ValueError(f"it is not in '{paths}', the folder of allow_paths")
            return read_image(text)
        try:
            return read_image(from_base64(text))
        except ValueError as error:
            if text[:5].lower() == "data:":
                raise
            files = "no file" if paths else "not opened if a file (the processor's allow_paths=FOLDER or True lets it)"
            raise ValueError(f"{files}, and no base64: {error}") from error
    except ValueError as error:
        raise ValueError(f"{shown} is no image: {error}") from error


def _filled(content: str | list | None, waiting: list[Image.Image]) -> str | list | None:
    """A message's content, its image parts without an image given one of `waiting`, which is used up."""
    if isinstance(content, str) or content is None:
        return content
    bare = {"type": "image"}
    return [bare | {"image": waiting.pop(0)} if part == bare and waiting else part for part in content]
