"""Conversations: LLaVA's and ShareGPT's `conversations`, `messages` in the style of OpenAI, the Cauldron's `texts`."""

from itertools import pairwise
from typing import Any

from data_pipeline.documents import RawDocument, RawImage, RawTurn, Unusable
from data_pipeline.formats.sample import Sample, kind, text
from megadual.streams import IMAGE, ImageUse, Role, TurnBit

ROLES = {
    "system": Role.SYSTEM, "human": Role.USER, "user": Role.USER, "gpt": Role.ASSISTANT, "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
}  # fmt: skip
MAY_FOLLOW = {  # by who spoke before
    None: (Role.SYSTEM, Role.USER),
    Role.SYSTEM: (Role.USER,),
    Role.USER: (Role.ASSISTANT,),
    Role.ASSISTANT: (Role.USER, Role.TOOL),
    Role.TOOL: (Role.TOOL, Role.ASSISTANT),
}

Said = tuple[Role, list[Any]]  # who, and the parts: texts and images


def conversation(sample: Sample, said: list[Said]) -> RawDocument:
    """Turns with what each image and turn is for. A system's turn without text is left out."""
    turns: list[RawTurn] = []
    for number, (role, parts) in enumerate(said, 1):
        turn = RawTurn(role, parts, TurnBit.LOSS if role == Role.ASSISTANT else TurnBit(0))
        if not turn.parts and role == Role.SYSTEM:
            continue
        before = turns[-1].role if turns else None
        if role not in MAY_FOLLOW[before]:
            place = "is the first" if before is None else f"follows one of the {_name(before)}"
            raise Unusable(f"wrong order: turn {number} ({_name(role)}) {place}")
        if not turn.parts:
            raise Unusable(f"turn {number} ({_name(role)}) is empty")
        for image in turn.images:
            image.use = ImageUse.DRAWN if role == Role.ASSISTANT else ImageUse.LOOKED_AT
        turns.append(turn)
    if not turns or turns[-1].role != Role.ASSISTANT:
        raise Unusable("wrong order: the last turn is not the assistant's" if turns else "it has no turns")
    for question, answer in pairwise(turns):
        if answer.role == Role.ASSISTANT and answer.images and question.role == Role.USER:
            question.bits |= TurnBit.DROPPABLE
            for image in question.images:
                image.use |= ImageUse.DROPPABLE
    return RawDocument(sample.key, turns)


def _name(role: Role) -> str:
    return role.name.lower()


def _role(value: Any, number: int) -> Role:
    if not isinstance(value, str) or value not in ROLES:
        raise Unusable(f"turn {number} has the unknown role {value!r}; known: {', '.join(ROLES)}")
    return ROLES[value]


def _with_images(said: list[Said], images: list[RawImage]) -> list[Said]:
    """An image in the place of each `<image>` in the texts."""
    marks = sum(part.count(IMAGE) for _, parts in said for part in parts)
    if marks != len(images):
        raise Unusable(f"{marks} {IMAGE} in the texts for {len(images)} images")
    waiting, filled = iter(images), []
    for role, parts in said:
        placed: list[Any] = []
        for part in parts:
            first, *rest = part.split(IMAGE)
            placed.append(first)
            for piece in rest:
                placed += [next(waiting), piece]
        # What stood around a mark may be nothing at all, which is no part.
        filled.append((role, [part for part in placed if part != ""]))
    return filled


def is_sharegpt(sample: Sample) -> bool:
    return isinstance(sample.fields.get("conversations"), list)


def read_sharegpt(sample: Sample) -> RawDocument:
    """`conversations: [{from, value}]`, an `<image>` in a value for each of `image` (or `images`)."""
    said: list[Said] = []
    for number, entry in enumerate(sample.objects("conversations"), 1):
        value = text(entry.get("value"), f"value of turn {number}", blank=True)
        said.append((_role(entry.get("from"), number), [value]))
    images = [sample.image(value) for value in sample.listed_images() or []]
    return conversation(sample, _with_images(said, images))


def is_messages(sample: Sample) -> bool:
    return isinstance(sample.fields.get("messages"), list)


def read_messages(sample: Sample) -> RawDocument:
    """`messages: [{role, content}]`, content a text or parts.

    Images are parts; one that names none is the next of `images`, or that of its `index`. Where no part is an image
    and there are `images`, they stand at the `<image>`s in the texts; without any such mark before the first user's
    text, as TRL has it.
    """
    listed = sample.listed_images()
    waiting, said = dict(enumerate(listed or [])), []
    for number, message in enumerate(sample.objects("messages"), 1):
        if message.get("tool_calls"):
            raise Unusable(f"turn {number} has tool_calls; write the call into its content")
        said.append((_role(message.get("role"), number), _parts(sample, message.get("content"), waiting, number)))
    spelt = [part for _, parts in said for part in parts]
    if not all(isinstance(part, str) for part in spelt):
        if waiting:
            raise Unusable(f"{len(waiting)} of the {len(listed or [])} images have no part in the messages")
    elif listed is not None:
        images = [sample.image(value) for value in listed]
        marked = any(IMAGE in part for part in spelt)
        said = _with_images(said, images) if marked else _before_first_question(said, images)
    return conversation(sample, said)


def _parts(sample: Sample, content: Any, waiting: dict[int, Any], number: int) -> list[Any]:
    """A message's texts and images; one without a name is taken from `waiting`, by its `index` or the next."""
    parts: list[Any] = []
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        of = part.get("type") if isinstance(part, dict) else kind(part)
        if of == "text":
            parts.append(text(part.get("text"), f"text of turn {number}", blank=True))
        elif of in ("image", "image_url"):
            named = [part[name] for name in ("image", "image_url", "url", "path") if part.get(name) is not None]
            index = part["index"] if part.get("index") is not None else next(iter(waiting), None)
            if not named and index not in waiting:
                raise Unusable(f"turn {number} has an image without a name, and 'images' has no more of them")
            parts.append(sample.image(named[0] if named else waiting.pop(index)))
        else:
            raise Unusable(f"turn {number} has a part of type '{of}'; known: text, image, image_url")
    return parts


def _before_first_question(said: list[Said], images: list[RawImage]) -> list[Said]:
    first = next((k for k, (role, _) in enumerate(said) if role == Role.USER), None)
    if first is None and images:
        raise Unusable(f"{len(images)} images, but no turn of a user")
    return [(role, images + parts if k == first else parts) for k, (role, parts) in enumerate(said)]


def is_cauldron(sample: Sample) -> bool:
    texts = sample.fields.get("texts")
    return isinstance(texts, list) and bool(texts) and all(isinstance(entry, dict) for entry in texts)


def read_cauldron(sample: Sample) -> RawDocument:
    """`texts: [{user, assistant, source}]`; all of `images` stand before the first question."""
    said: list[Said] = []
    for number, entry in enumerate(sample.objects("texts"), 1):
        for role in (Role.USER, Role.ASSISTANT):
            said.append((role, [text(entry.get(_name(role)), f"{_name(role)} of exchange {number}")]))
    images = [sample.image(value) for value in sample.listed_images() or []]
    return conversation(sample, _before_first_question(said, images))
