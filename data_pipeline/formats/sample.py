"""What a sample holds, as the formats ask for it: texts, lists, images."""

import base64
import binascii
import re
from typing import Any

from data_pipeline.bounded_json import parse_json
from data_pipeline.config import ReadConfig
from data_pipeline.documents import RawImage, Unusable
from data_pipeline.image_root import ImageRoot
from data_pipeline.readers import RawSample


class Sample:
    """`fields` are a row's columns, a JSON object's, or those of a tar's KEY.json; `members` are those of the file."""

    def __init__(self, raw: RawSample, read: ReadConfig, images: ImageRoot | None = None):
        self.key, self.members, self.read, self.root = raw.key, raw.members, read, images
        self.fields = self.members
        if isinstance(self.members.get("json"), bytes):  # a tar's
            try:
                described = parse_json(self.members["json"])
            except ValueError as error:
                raise Unusable("its .json is not JSON") from error
            self.fields = described if isinstance(described, dict) else {}

    def get(self, name: str) -> Any:
        """A field, or else a tar's member KEY.NAME or KEY.NAME.SUFFIX; None where there is none."""
        if self.fields.get(name) is not None:
            return self.fields[name]
        names = [name, f"{name}.txt", *(f"{name}.{suffix}" for suffix in self.read.images)]
        return next((self.members[name] for name in names if self.members.get(name) is not None), None)

    def entries(self, name: str) -> list:
        value = self.get(name)
        if not isinstance(value, list):
            raise Unusable(f"it has no list '{name}'" if value is None else f"'{name}' is {kind(value)}, not a list")
        return value

    def objects(self, name: str) -> list[dict]:
        entries = self.entries(name)
        for entry in entries:
            if not isinstance(entry, dict):
                raise Unusable(f"'{name}' holds {kind(entry)}, not only objects")
        return entries

    def listed_images(self) -> list | None:
        """The images of a conversation, in order; None where it can have none.

        They are `image` or `images`. In a tar they are its image members, by name (numbers by value), unless those
        fields name members.
        """
        values = [self.fields[name] for name in ("image", "images") if self.fields.get(name) is not None]
        if len(values) > 1:
            raise Unusable("it has both 'image' and 'images'; leave out one")
        listed = None if not values else values[0] if isinstance(values[0], list) else [values[0]]
        if self.fields is self.members:
            return listed
        members = sorted((name for name in self.members if self._is_image(name)), key=_by_number)
        if not members or (listed and any(isinstance(name, str) and self._member(name) for name in listed)):
            return listed
        return [self.members[name] for name in members]

    def _is_image(self, member: str) -> bool:
        return member.rpartition(".")[2] in self.read.images

    def _member(self, name: str) -> bytes | None:
        """A tar's member by its suffix ("0.jpg"), its whole name (FOLDER/KEY.0.jpg) or that without folders."""
        key = self.key.partition("/")[2]
        suffix = name.removeprefix(f"{key}.").removeprefix(f"{key.rpartition('/')[2]}.")
        found = self.members.get(suffix.lower())  # as webdataset spells it
        return found if isinstance(found, bytes) else None

    def image(self, value: Any, linked: bool = False) -> RawImage:
        """The image that a value is or names: bytes, datasets' struct of bytes and path, a name, base64 (data:...)."""
        if isinstance(value, dict):
            value = next((value[name] for name in ("bytes", "path", "url") if value.get(name) is not None), None)
        if isinstance(value, str):
            if value.startswith("data:"):
                return RawImage(_from_base64(value.partition(",")[2]))
            found = self._member(value)
            if found is None and self.root is None:
                raise Unusable(f"no image '{value}' in the sample; where it is a file's name, set read.image_root")
            if found is None:
                return RawImage(self.root.reader(value), linked=linked)
            value = found
        if not isinstance(value, bytes):
            raise Unusable(f"the image is {kind(value)}, neither bytes nor a name")
        if not value:
            raise Unusable("the image has 0 bytes")
        return RawImage(value)


def text(value: Any, what: str, blank: bool = False) -> str:
    """A text, also where it stands as UTF-8; Unusable where there is none, or only space."""
    try:
        value = value.decode("utf-8") if isinstance(value, bytes) else value
        if not isinstance(value, str):
            raise Unusable(f"the {what} is {kind(value)}, not a string")
        value.encode("utf-8")  # JSON may spell half a surrogate pair
    except UnicodeError as error:
        raise Unusable(f"the {what} is not UTF-8") from error
    if not blank and not value.strip():
        raise Unusable(f"the {what} is empty")
    return value


def kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _by_number(name: str) -> list:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _from_base64(spelt: str) -> bytes:
    try:
        return base64.b64decode(spelt, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable(f"the image is not base64: {error}") from error
