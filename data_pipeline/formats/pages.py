"""Pages: texts and images in the order in which they are read, of which all is learned. OBELICS, MMC4."""

from data_pipeline.documents import RawDocument, RawTurn, Unusable
from data_pipeline.formats.sample import Sample, kind, text
from megadual.streams import Role


def is_interleaved(sample: Sample) -> bool:
    texts, images = sample.fields.get("texts"), sample.fields.get("images")
    if not isinstance(texts, list) or not isinstance(images, list):
        return False
    return not texts or not all(isinstance(entry, dict) for entry in texts)


def read_interleaved(sample: Sample) -> RawDocument:
    """`texts` and `images`, two lists of one length that hold at each place either a text or an image, the other null.

    An image is its bytes, the suffix of a tar's member ("0.jpg" for KEY.0.jpg), or, in OBELICS, a link.
    """
    texts, images = sample.entries("texts"), sample.entries("images")
    if len(texts) != len(images):
        raise Unusable(f"{len(texts)} texts beside {len(images)} images; both lists must have one length")
    parts = []
    for place, (said, image) in enumerate(zip(texts, images, strict=True)):
        if (said is None) == (image is None):
            raise Unusable(f"place {place} must hold either a text or an image")
        if image is None:
            parts.append(text(said, f"text at place {place}", blank=True))
        else:
            parts.append(sample.image(image, linked=isinstance(image, str) and "://" in image))
    return _page(sample, parts, between="\n\n")


def is_mmc4(sample: Sample) -> bool:
    return all(isinstance(sample.fields.get(name), list) for name in ("text_list", "image_info"))


def read_mmc4(sample: Sample) -> RawDocument:
    """`text_list` with each image of `image_info` before the text that it was matched to.

    The image is the file `image_name`, or what open_flamingo's converter puts beside that, `image_base64`.
    """
    texts = [text(said, f"text {place}", blank=True) for place, said in enumerate(sample.entries("text_list"))]
    before: list[list] = [[] for _ in texts]
    for info in sample.objects("image_info"):
        place = info.get("matched_text_index")
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise Unusable(f"matched_text_index is {place}, there are {len(texts)} texts")
        spelt, name = info.get("image_base64"), info.get("image_name")
        if not isinstance(spelt or name, str):
            raise Unusable(f"image_name is {kind(name)}, not a string")
        before[place].append(sample.image(f"data:,{spelt}" if spelt else name, linked=True))
    parts = [part for images, said in zip(before, texts, strict=True) for part in (*images, said)]
    return _page(sample, parts, between=" ")


def _page(sample: Sample, parts: list, between: str) -> RawDocument:
    return RawDocument(sample.key, [RawTurn(Role.DOCUMENT, parts, between=between)])
