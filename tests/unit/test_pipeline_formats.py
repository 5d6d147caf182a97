"""The formats that labs have their data in, in files of the published names and types."""

import base64
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from PIL import Image

from data_pipeline import bounded_json, browse, config, formats
from data_pipeline.config import EncodeConfig, FilterConfig, PipelineConfig, ReadConfig
from data_pipeline.decode import decode
from data_pipeline.documents import LeftOut, RawDocument, Unusable
from data_pipeline.encode import Encoder
from data_pipeline.formats import to_document
from data_pipeline.image_root import ImageRoot, open_image_root
from data_pipeline.manifest import commonest_reason
from data_pipeline.plan import describe, make_plan
from data_pipeline.readers import RawSample, list_inputs, read_samples
from data_pipeline.store import open_store
from data_pipeline.writer import quarantine_line
from megadual.config import load_config
from megadual.errors import UserError
from megadual.streams import SPECIAL_TOKENS, Document, ImageUse, Role, SpecialIds, TurnBit
from megadual.synthetic.files import write_tar
from megadual.testing.models import CAPTIONS, write_dualtoken
from megadual.testing.raw import (
    image_structs,
    plain_image,
    write_entries,
    write_folder,
    write_json_lines,
    write_parquet,
)
from megadual.text import load_text_tokenizer, save_text_tokenizer, train_text_tokenizer

IMAGES = [plain_image(i) for i in range(12)]
TRAP = "<|im_start|>system\n<image_gen_start>"  # stays text wherever it stands


def script(document: RawDocument) -> list[str]:
    """Each turn as "role: parts", `!` where it has a loss, `~` where it, or an image, may be dropped."""
    lines = []
    for turn in document.turns:
        line = turn.role.name.lower() + "!" * bool(turn.bits & TurnBit.LOSS) + "~" * bool(turn.bits & TurnBit.DROPPABLE)
        spelt = []
        for part in turn.parts:
            if isinstance(part, str):
                spelt.append(part)
            else:
                use = ImageUse(part.use & ImageUse.EITHER).name.lower()
                spelt.append(f"[{IMAGES.index(part.load())} {use}{'~' * bool(part.use & ImageUse.DROPPABLE)}]")
        lines.append(f"{line}: {'|'.join(spelt)}")
    return lines


def scripts(path: Path, **read) -> dict[str, list[str] | str]:
    """Key (without the shard's name) -> its script, or the reason why there is none."""
    said = {}
    (shard,) = list_inputs([str(path)])
    settings = ReadConfig(**read)
    images = open_image_root(settings, shard.name)
    for sample, _ in read_samples(shard):
        try:
            document = to_document(sample, settings, images)
            document.load()
            said[sample.key.partition("/")[2]] = script(document)
        except (Unusable, LeftOut) as reason:
            said[sample.key.partition("/")[2]] = str(reason)
    return said


# LLaVA, ShareGPT

LLAVA = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is it? {TRAP}"},
            {"from": "gpt", "value": " A bus.\n"},
            {"from": "human", "value": "Its colour?"},
            {"from": "gpt", "value": "White and red."},
        ],
    },
    {
        "id": "wgByO4Y_0",
        "model": "",
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
    },
    {
        "id": "two",
        "image": ["vg/VG_100K/2.jpg", "vg/VG_100K/3.jpg"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nand <image>: what differs?\n"},
            {"from": "gpt", "value": "The colour."},
        ],
    },
    {
        "id": "draws",
        "image": ["vg/VG_100K/2.jpg", "vg/VG_100K/3.jpg"],
        "conversations": [
            {"from": "human", "value": "Make it red: <image>"},
            {"from": "gpt", "value": "Here: <image>"},
            {"from": "human", "value": "Thanks"},
            {"from": "gpt", "value": "You are welcome"},
        ],
    },
]
LLAVA_FILES = {
    "coco/train2017/000000033471.jpg": IMAGES[1], "vg/VG_100K/2.jpg": IMAGES[2], "vg/VG_100K/3.jpg": IMAGES[3]
}  # fmt: skip
LLAVA_SCRIPTS = {
    "00000000": [
        f"user: [1 looked_at]|What is it? {TRAP}", "assistant!: A bus.",
        "user: Its colour?", "assistant!: White and red.",
    ],
    "00000001": ["user: Hi", "assistant!: Ho"],
    "00000002": [
        "system: Be brief.", "user: [2 looked_at]|and |[3 looked_at]|: what differs?", "assistant!: The colour."
    ],
    "00000003": [
        "user~: Make it red:|[2 looked_at~]", "assistant!: Here:|[3 drawn]", "user: Thanks",
        "assistant!: You are welcome",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ["llava.json", "llava.json.gz", "llava.jsonl", "llava.jsonl.gz"])
@pytest.mark.parametrize("place", ["folder", "tar", "url", "tar of the shard"])
def test_llava(tmp_path, name, place):
    """Its images in a folder, below a URL, in a tar; an image that is drawn, and what may be dropped then."""
    write_entries(tmp_path / name, LLAVA)
    root = f"{tmp_path}/images"
    if place == "folder":
        write_folder(tmp_path / "images", LLAVA_FILES)
    elif place == "url":
        root = "memory://llava/images"
        for file, data in LLAVA_FILES.items():
            fsspec.filesystem("memory").pipe_file(f"/llava/images/{file}", data)
    else:
        write_tar(tmp_path / "llava.tar", [(f"./{file}", data) for file, data in LLAVA_FILES.items()])
        root = f"{tmp_path}/{'{shard}' if 'shard' in place else 'llava'}.tar"
    assert scripts(tmp_path / name, image_root=root) == LLAVA_SCRIPTS


def test_llava_in_a_tar(tmp_path):
    """By name where members have it, else in the order of their numbers; the name may be of the lab's own folder."""
    asks = lambda count: [{"from": "human", "value": "<image>" * count + "Which?"}, {"from": "gpt", "value": "All."}]
    write_tar(tmp_path / "a.tar", [
        ("one.json", json.dumps({"image": "coco/1.jpg", "conversations": asks(1)}).encode()), ("one.jpg", IMAGES[1]),
        ("many.json", json.dumps({"conversations": asks(3)}).encode()),
        ("many.10.png", IMAGES[4]), ("many.2.png", IMAGES[3]), ("many.0.png", IMAGES[2]),
        ("named.json", json.dumps({"image": ["b.png", "named.A.png"], "conversations": asks(2)}).encode()),
        ("named.A.png", IMAGES[5]), ("named.b.png", IMAGES[6]),
        ("few.json", json.dumps({"conversations": asks(2)}).encode()), ("few.png", IMAGES[5]),
        ("lost.json", json.dumps({"image": ["0.png", "1.png"], "conversations": asks(2)}).encode()),
        ("lost.0.png", IMAGES[5]),
    ])  # fmt: skip
    answer = "assistant!: All."
    assert scripts(tmp_path / "a.tar") == {
        "one": ["user: [1 looked_at]|Which?", answer],
        "many": ["user: [2 looked_at]|[3 looked_at]|[4 looked_at]|Which?", answer],
        "named": ["user: [6 looked_at]|[5 looked_at]|Which?", answer],
        "few": "2 <image> in the texts for 1 images",
        "lost": "no image '1.png' in the sample; where it is a file's name, set read.image_root",
    }


def test_llava_in_parquet(tmp_path):
    """LLaVA-OneVision's columns."""
    said = [[{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}],
            [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]]  # fmt: skip
    write_parquet(
        tmp_path / "a.parquet",
        id=["a", "b"],
        image=image_structs([IMAGES[1], None]),
        conversations=pa.array(said, pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        data_source=["x", "x"],
    )
    assert list(scripts(tmp_path / "a.parquet").values()) == [
        ["user: [1 looked_at]|Q", "assistant!: A"], ["user: Q", "assistant!: A"]
    ]  # fmt: skip


# messages


def test_messages_in_parquet(tmp_path):
    """The columns of llava-instruct-mix-vsft: parts with an index, images in a list."""
    part = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
    message = pa.struct([("content", pa.list_(part)), ("role", pa.string())])
    said = lambda *parts: [{"index": i, "text": text, "type": "image" if text is None else "text"} for i, text in parts]
    write_parquet(
        tmp_path / "a.parquet",
        messages=pa.array(
            [[{"role": "user", "content": said((None, f"Which? <image> {TRAP}\n"), (1, None), (0, None))},
              {"role": "assistant", "content": said((None, "The "), (None, "first."))}]],
            pa.list_(message),
        ),
        images=image_structs([[IMAGES[1], IMAGES[2]]]),
    )  # fmt: skip
    assert scripts(tmp_path / "a.parquet")["00000000"] == [
        f"user: Which? <image> {TRAP}|[2 looked_at]|[1 looked_at]", "assistant!: The first."
    ]  # fmt: skip


def say(*contents) -> list[dict]:
    """Messages of a user and an assistant in turn."""
    return [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]


DATA_URL = "data:image/png;base64," + base64.b64encode(IMAGES[7]).decode()
IMAGE_PART = {"type": "image"}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_messages_in_json(tmp_path, name):
    write_folder(tmp_path / "images", {"1.png": IMAGES[1], "2.png": IMAGES[2]})
    text = lambda text: {"type": "text", "text": text}
    cases = [
        ({"messages": say("<image>Q", "A<image>"), "images": ["1.png", "2.png"]},  # ms-swift
         ["user~: [1 looked_at~]|Q", "assistant!: A|[2 drawn]"]),
        ({"messages": say("Q", "A", "R", "B"), "images": ["1.png", "2.png"]},  # TRL
         ["user: [1 looked_at]|[2 looked_at]|Q", "assistant!: A", "user: R", "assistant!: B"]),
        ({"messages": say("What does <image> mean?", "A")}, ["user: What does <image> mean?", "assistant!: A"]),
        ({"messages": say([IMAGE_PART, text(" <image> ")], "A"), "images": ["1.png"]},
         ["user: [1 looked_at]|<image>", "assistant!: A"]),
        ({"messages": say([text(" a "), text("  b "), IMAGE_PART, text(" c ")], " \nA "), "images": ["1.png"]},
         ["user: a   b |[1 looked_at]| c", "assistant!: A"]),
        ({"messages": say([text(" "), IMAGE_PART, text(" c\n")], "A"), "images": ["1.png"]},
         ["user: [1 looked_at]| c", "assistant!: A"]),
        ({"messages": say([{"type": "image", "image": "2.png"}, text("Q")], [{"type": "image", "path": "1.png"}])},
         ["user~: [2 looked_at~]|Q", "assistant!: [1 drawn]"]),
        ({"messages": say([text("Q"), {"type": "image_url", "image_url": {"url": DATA_URL}}], "A")},
         ["user: Q|[7 looked_at]", "assistant!: A"]),
        ({"messages": [{"role": "system", "content": ""}, *say("Q", "call()"), {"role": "tool", "content": "5"},
                       {"role": "tool", "content": "6"}, {"role": "assistant", "content": "11"}]},
         ["user: Q", "assistant!: call()", "tool: 5", "tool: 6", "assistant!: 11"]),
        ({"messages": say("Q"), "images": []}, "wrong order: the last turn is not the assistant's"),
        ({"messages": say("<image>Q", "A"), "images": []}, "1 <image> in the texts for 0 images"),
        ({"messages": say("<image>Q", "A"), "images": ["1.png", "2.png"]}, "1 <image> in the texts for 2 images"),
        ({"messages": say([IMAGE_PART, IMAGE_PART], "A"), "images": ["1.png"]},
         "turn 1 has an image without a name, and 'images' has no more of them"),
        ({"messages": say([IMAGE_PART], "A"), "images": ["1.png", "2.png"]},
         "1 of the 2 images have no part in the messages"),
        ({"messages": say([{"type": "video"}], "A")}, "turn 1 has a part of type 'video'; known: text, image"),
        ({"messages": say(None, "A")}, "the text of turn 1 is null, not a string"),
        ({"messages": [*say("Q"), {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
         "turn 2 has tool_calls; write the call into its content"),
        ({"messages": ["Q"]}, "'messages' holds str, not only objects"),
        ({"messages": []}, "it has no turns"),
    ]  # fmt: skip
    write_entries(tmp_path / name, [sample for sample, _ in cases])
    said = scripts(tmp_path / name, image_root=str(tmp_path / "images"))
    for found, (sample, expected) in zip(said.values(), cases, strict=True):
        if isinstance(expected, str):
            assert isinstance(found, str) and expected in found, sample
        else:
            assert found == expected, sample


# the Cauldron


def write_cauldron(path: Path, images: list, texts: list) -> None:
    exchange = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())])
    write_parquet(path, images=image_structs(images), texts=pa.array(texts, pa.list_(exchange)))


def test_cauldron(tmp_path):
    exchange = lambda q, a: {"user": q, "assistant": a, "source": "VQAv2"}
    write_cauldron(
        tmp_path / "a.parquet",
        [[IMAGES[1], IMAGES[2]], [IMAGES[3]]],
        [[exchange(f"Q <image> {TRAP}\n", "A"), exchange("R", " B")], [exchange("Q", " ")]],
    )
    assert scripts(tmp_path / "a.parquet") == {
        "00000000": [
            f"user: [1 looked_at]|[2 looked_at]|Q <image> {TRAP}",
            "assistant!: A",
            "user: R",
            "assistant!: B",
        ],
        "00000001": "the assistant of exchange 1 is empty",
    }


# pages


def sha256(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def test_obelics(tmp_path):
    """Links are files named by their SHA-256; a dead one is left out alone, unless all are dead."""
    urls = [f"https://example.org/a/{i}.jpg?w=1&h=2" for i in range(4)]
    write_folder(tmp_path / "images", {sha256(urls[1]) + ".jpg": IMAGES[1], sha256(urls[2]): IMAGES[2]})
    strings = pa.list_(pa.string())
    images = [[urls[1], None, urls[2]], [None, urls[3], None, urls[1]], [urls[0], None, urls[3]], [None]]
    texts = [[None, f"T <image> {TRAP}", None], [" One.", None, "Two.", None], [None, "Dead.", None], ["Only text"]]
    count = len(images)
    write_parquet(
        tmp_path / "a.parquet",
        images=pa.array(images, strings),
        metadata=["[]"] * count,
        general_metadata=["{}"] * count,
        texts=pa.array(texts, strings),
    )
    said = list(scripts(tmp_path / "a.parquet", image_root=str(tmp_path / "images")).values())
    assert said[0] == [f"document!: [1 either]|T <image> {TRAP}|[2 either]"]
    assert said[1] == ["document!: One.\n\nTwo.|[1 either]"]
    assert said[2].startswith(f"none of the page's images is there: no image '{urls[0]}' in read.image_root=")
    assert said[3] == ["document!: Only text"]
    assert "set read.image_root" in scripts(tmp_path / "a.parquet")["00000000"]
    (shard,) = list_inputs([f"{tmp_path}/a.parquet"])
    second = [sample for sample, _ in read_samples(shard)][1]
    document = to_document(second, ReadConfig(), ImageRoot(f"{tmp_path}/images"))
    assert decode(document, FilterConfig(), EncodeConfig()).left_out_images == {"not_downloaded": 1}


def mmc4(texts: list[str], *images: tuple[str, int]) -> dict:
    infos = [
        {"image_name": name, "raw_url": f"https://x.org/{name}", "matched_text_index": at, "matched_sim": 0.3}
        for name, at in images
    ]
    matrix = [[0.3] * len(texts)] * len(images)
    return {"url": "https://example.org", "text_list": texts, "image_info": infos, "similarity_matrix": matrix,
            "could_have_url_duplicate": 0}  # fmt: skip


@pytest.mark.parametrize("name", ["docs_shard_0_v2.jsonl", "a.tar"])
def test_mmc4(tmp_path, name):
    """An image stands before the text that it was matched to."""
    texts = [" First.", "Second <image>.", f"Third {TRAP}"]
    pages = [
        mmc4(texts, ("b.png", 2), ("a.png", 0), ("c.png", 2)),
        mmc4(texts, ("lost.png", 1), ("a.png", 1)),
        mmc4(texts, ("a.png", 3)),
        mmc4(texts, ("../a.png", 0)),
        mmc4(texts),
    ]
    spelt = {**mmc4(texts, ("no.png", 1))}
    spelt["image_info"][0]["image_base64"] = base64.b64encode(IMAGES[4]).decode()  # open_flamingo's converter
    write_folder(tmp_path / "images", {"a.png": IMAGES[1], "b.png": IMAGES[2], "c.png": IMAGES[3]})
    if name == "a.tar":
        write_tar(tmp_path / name, [(f"{i}.json", json.dumps(page).encode()) for i, page in enumerate([*pages, spelt])])
    else:
        write_entries(tmp_path / name, [*pages, spelt])
    said = list(scripts(tmp_path / name, image_root=str(tmp_path / "images")).values())
    assert said[0] == [f"document!: [1 either]|First. Second <image>.|[2 either]|[3 either]|Third {TRAP}"]
    assert said[1] == [f"document!: First.|[1 either]|Second <image>. Third {TRAP}"]
    assert said[2] == "matched_text_index is 3, there are 3 texts"
    assert "'../a.png' is not below read.image_root" in said[3]
    assert said[4] == [f"document!: First. Second <image>. Third {TRAP}"]
    assert said[5] == [f"document!: First.|[4 either]|Second <image>. Third {TRAP}"]


# edits


def test_instructpix2pix(tmp_path):
    write_parquet(
        tmp_path / "a.parquet",
        original_prompt=["a cat", "a cat"],
        original_image=image_structs([IMAGES[1], IMAGES[1]]),
        edit_prompt=[f" make it <image> {TRAP} ", " "],
        edited_prompt=["a dog", "a dog"],
        edited_image=image_structs([IMAGES[2], IMAGES[2]]),
    )
    edit = [f"user~: [1 looked_at~]|make it <image> {TRAP}", "assistant!: [2 drawn]"]
    assert scripts(tmp_path / "a.parquet") == {"00000000": edit, "00000001": "the instruction is empty"}
    write_tar(tmp_path / "a.tar", [
        ("0.original_image.png", IMAGES[1]), ("0.edited_image.png", IMAGES[2]),
        ("0.json", json.dumps({"edit_prompt": f"make it <image> {TRAP}"}).encode()),
        ("1.original_image.jpg", IMAGES[1]), ("1.edited_image.jpg", IMAGES[2]), ("1.edit_prompt.txt", b"make it a dog"),
        ("2.original_image.jpg", IMAGES[1]), ("2.json", b'{"edit_prompt": "make it a dog"}'),
    ])  # fmt: skip
    assert scripts(tmp_path / "a.tar") == {
        "0": edit,
        "1": ["user~: [1 looked_at~]|make it a dog", "assistant!: [2 drawn]"],
        "2": "no known format: it holds edit_prompt, json, original_image.jpg",
    }


def test_omniedit(tmp_path):
    """Of several instructions for an edit the sample's key picks one: each time the same, and all of them in turn."""
    rows = 40
    write_parquet(
        tmp_path / "a.parquet",
        omni_edit_id=[f"task_obj_swap_{i}" for i in range(rows)],
        task=["swap"] * rows,
        src_img=image_structs([IMAGES[1]] * rows),
        edited_img=image_structs([IMAGES[2]] * rows),
        edited_prompt_list=pa.array([["Swap it.", f"Replace the <image> {TRAP}.", " "]] * rows, pa.list_(pa.string())),
        width=[32] * rows,
        height=[32] * rows,
        sc_score_1=[9] * rows,
        sc_score_2=[9] * rows,
        sc_reasoning=[""] * rows,
        pq_score=[9] * rows,
        pq_reasoning=[""] * rows,
        o_score=[9.0] * rows,
    )
    said = scripts(tmp_path / "a.parquet")
    assert said == scripts(tmp_path / "a.parquet")
    assert all(answer == "assistant!: [2 drawn]" for _, answer in said.values())
    asked = Counter(question for question, _ in said.values())
    swap, replace = "user~: [1 looked_at~]|Swap it.", f"user~: [1 looked_at~]|Replace the <image> {TRAP}."
    assert asked.keys() == {swap, replace} and min(asked.values()) > rows / 5


def test_bagel(tmp_path):
    """Its edits of several steps are a turn each, and its pairs have captions in JSON."""
    texts = pa.list_(pa.list_(pa.string()))
    write_parquet(
        tmp_path / "edits.parquet",
        image_list=pa.array([IMAGES[1:4], IMAGES[1:3], IMAGES[1:2]], pa.list_(pa.binary())),
        instruction_list=pa.array([[["add a hat"], [f"now <image> {TRAP}"]], [["a"], ["b"]], []], texts),
    )
    assert scripts(tmp_path / "edits.parquet") == {
        "00000000": [
            "user~: [1 looked_at~]|add a hat", "assistant!: [2 drawn]",
            f"user~: now <image> {TRAP}", "assistant!: [3 drawn]",
        ],
        "00000001": "2 entries of instructions for 2 images; one less is needed",
        "00000002": "0 entries of instructions for 1 images; one less is needed",
    }  # fmt: skip
    captions = ['{"0": "a cat", "1": " an animal "}', '["a dog"]', "a cat", '{"0": ""}', "5"]
    write_parquet(tmp_path / "pairs.parquet", image=pa.array(IMAGES[1:6], pa.binary()), captions=captions)
    assert list(scripts(tmp_path / "pairs.parquet").values()) == [
        ["caption!: [1 either]|a cat", "caption!: an animal"],
        ["caption!: [2 either]|a dog"],
        "the captions are not JSON",
        "the caption is empty",
        "the captions are JSON, but int, neither a list nor an object",
    ]


# pairs


def test_pairs_of_several_captions_are_filtered_by_caption():
    def kept(captions: list[str], **filters):
        document = to_document(RawSample("k", {"jpg": IMAGES[1], "caption": captions}), ReadConfig())
        return decode(document, FilterConfig(**filters), EncodeConfig())

    found = kept(["a", "a cat", "", "a very long caption", "a dog"], min_caption=3, max_caption=10)
    assert [turn.parts[-1] for turn in found.turns] == ["a cat", "a dog"]
    assert [len(turn.parts) for turn in found.turns] == [2, 1]
    assert found.left_out_captions == {"min_caption": 1, "max_caption": 1}
    with pytest.raises(LeftOut, match="max_caption"):
        kept(["a very long caption", "a"], min_caption=3, max_caption=10)


def test_named_images_of_pairs_are_found(tmp_path):
    write_folder(tmp_path / "images", {"a/1.png": IMAGES[1]})
    write_entries(tmp_path / "a.jsonl", [{"image": "a/1.png", "caption": "a cat"}, {"image": "2.png", "caption": "x"}])
    write_parquet(tmp_path / "b.parquet", image=[{"bytes": None, "path": "a/1.png"}], caption=["a cat"])
    root = str(tmp_path / "images")
    said = scripts(tmp_path / "a.jsonl", image_root=root)
    assert said["00000000"] == ["caption!: [1 either]|a cat"]
    assert said["00000001"] == f"no image '2.png' in read.image_root={root}"
    assert scripts(tmp_path / "b.parquet", image_root=root)["00000000"] == ["caption!: [1 either]|a cat"]


# which format


@pytest.mark.parametrize(
    "sample, names",
    [
        ({"conversations": [], "image": b"x", "caption": "c"}, ["conversations", "pair"]),
        ({"conversations": [], "messages": []}, ["conversations", "messages"]),
        ({"messages": [], "text": "t"}, ["messages", "text"]),
        ({"texts": ["t"], "images": [None], "messages": []}, ["messages", "interleaved"]),
        (
            {"original_image": b"x", "edited_image": b"y", "edit_prompt": "p", "jpg": b"z", "txt": b"c"},
            ["edit", "pair"],
        ),
    ],
)
def test_what_can_be_read_in_two_ways_is_told(sample, names):
    with pytest.raises(Unusable, match=f"can be read as {' or as '.join(names)}; say which: read.format={names[0]}"):
        to_document(RawSample("k", sample), ReadConfig())


def test_format_of_the_config_decides():
    sample = RawSample("k", {"messages": say("Q", "A"), "text": "plain", "image": IMAGES[1], "caption": "a cat"})
    read = lambda format: script(to_document(sample, ReadConfig(format=format)))
    assert read("messages") == ["user: [1 looked_at]|Q", "assistant!: A"]
    assert read("text") == ["document!: plain"]
    assert read("pair") == ["caption!: [1 either]|a cat"]
    with pytest.raises(Unusable, match="it has no list 'conversations'"):
        read("conversations")
    assert config.FORMATS == ("auto", *formats.FORMATS)
    for format in formats.FORMATS:  # each says what it lacks, and raises nothing else
        with pytest.raises(Unusable, match="it has no|none of|is null"):
            to_document(RawSample("k", {"other": 1}), ReadConfig(format=format))


@pytest.mark.parametrize(
    "texts, reason",
    [
        ([], "0 texts beside 1 images"),
        ([{"user": "Q", "assistant": "A"}, "text"], "2 texts beside 1 images"),
        ([{"question": "Q"}], "the user of exchange 1 is null"),
    ],
)
def test_texts_and_images_that_are_neither_pages_nor_the_cauldrons(texts, reason):
    with pytest.raises(Unusable, match=reason):
        to_document(RawSample("k", {"texts": texts, "images": [IMAGES[1]]}), ReadConfig())


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([("human", "Q"), ("gpt", " \n")], r"turn 2 \(assistant\) is empty"),
        ([("human", "Q"), ("bing", "A")], "turn 2 has the unknown role 'bing'; known: system, human"),
        (
            [("gpt", "A"), ("human", "Q"), ("gpt", "A")],
            r"wrong order: turn 1 \(assistant\) is the first",
        ),
        (
            [("human", "Q"), ("human", "Q"), ("gpt", "A")],
            r"wrong order: turn 2 \(user\) follows one of the user",
        ),
        ([("human", "Q"), ("gpt", "A"), ("system", "S")], r"wrong order: turn 3 \(system\) follows"),
        ([("human", "Q"), ("gpt", "A"), ("human", "Q")], "wrong order: the last turn is not the assistant's"),
        ([("system", "S")], "wrong order: the last turn is not the assistant's"),
        ([("human", "<image>"), ("gpt", "A")], "1 <image> in the texts for 0 images"),
        ([("human", None), ("gpt", "A")], "the value of turn 1 is null"),
        ([("human", "\ud800"), ("gpt", "A")], "the value of turn 1 is not UTF-8"),
        ([(3, "Q")], "turn 1 has the unknown role 3"),
    ],
)
def test_broken_conversations_have_their_reasons(turns, reason):
    said = [{"from": role, "value": value} for role, value in turns]
    with pytest.raises(Unusable, match=reason):
        to_document(RawSample("k", {"conversations": said}), ReadConfig())


def test_filtered_images_take_their_conversation_with_them():
    sample = {"conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}],
              "image": plain_image(1, (8, 8))}  # fmt: skip
    with pytest.raises(LeftOut, match="min_side"):
        decode(to_document(RawSample("k", sample), ReadConfig()), FilterConfig(), EncodeConfig())


# where images are


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../secret.png", "{tmp}/secret.png", "/etc/passwd", "", "a\0.png"]
)
def test_nothing_outside_the_image_root_is_read(tmp_path, kind, name):
    write_folder(tmp_path, {"secret.png": IMAGES[1], "images/a/1.png": IMAGES[2]})
    write_tar(tmp_path / "images.tar", [("a/1.png", IMAGES[2]), ("../secret.png", IMAGES[1])])
    root = ImageRoot(f"{tmp_path}/images" + ".tar" * (kind == "tar"))
    with pytest.raises(Unusable, match="is not below read.image_root"):
        root.reader(name.format(tmp=tmp_path))
    assert root.reader("a/1.png")() == root.reader("./a//1.png")() == IMAGES[2]
    for missing in ("a/2.png", "a", "a/1.png/b", "x" * 300):
        with pytest.raises(Unusable, match=f"no image '{missing}' in read.image_root"):
            root.reader(missing)()


def test_absolute_names_below_the_root_are_read(tmp_path, monkeypatch):
    write_folder(tmp_path / "images", {"1.png": IMAGES[1]})
    assert ImageRoot(f"{tmp_path}/images/").reader(f"{tmp_path}/images/1.png")() == IMAGES[1]
    monkeypatch.chdir(tmp_path)
    assert ImageRoot("images").reader(f"{tmp_path}/images/1.png")() == IMAGES[1]
    fsspec.filesystem("memory").pipe_file("/some/1.png", IMAGES[2])
    assert ImageRoot("memory://some").reader("memory://some/1.png")() == IMAGES[2]


def test_a_failed_read_of_an_image_is_no_missing_one(tmp_path, monkeypatch):
    """It is raised, for another attempt at the shard."""
    root = ImageRoot(str(tmp_path))

    def fails(*args, **kwargs):
        raise ConnectionError("reset")

    monkeypatch.setattr(root.files, "cat_file", fails)
    with pytest.raises(ConnectionError):
        root.reader("1.png")()


# JSON arrays


@pytest.mark.parametrize("piece", [1, 2, 7, 64])
def test_arrays_are_cut_anywhere(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(bounded_json, "PIECE", piece)
    entries = [
        {"text": 'brackets ]}, quotes " and \\ é 漢字 🎉', "n": [1, -2.5e3, None, {"a": []}]},
        {},
        {"text": "x" * 99},
    ]
    (tmp_path / "a.json").write_bytes("\ufeff".encode() + b" \n" + json.dumps(entries, ensure_ascii=False).encode())
    (tmp_path / "b.json").write_text(json.dumps(entries, indent=1))
    write_entries(tmp_path / "c.json.gz", entries)
    (tmp_path / "d.json").write_text(" [ ]\n")
    *filled, empty = list_inputs([f"{tmp_path}/*.json*"])
    for shard in filled:
        assert [sample.members for sample, _ in read_samples(shard)] == entries
    assert list(read_samples(empty)) == []


def test_json_that_is_no_array_is_read_by_lines(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert scripts(tmp_path / "a.json") == {"00000000": ["document!: one"], "00000001": ["document!: two"]}


@pytest.mark.parametrize(
    "tail, reason",
    [
        ('{"text": "b"', "Expecting"),
        ("", "the end where , or ] must stand"),
        (' {"text": "b"}]', "damaged JSON after 2 entries: '{' where , or ] must stand"),
        (', {"text": nope}]', "Expecting value"),
        ("] [", "there is more behind the array"),
        (', "\udcff"]', "can't decode"),
        ("," + "[" * 100_000, "recursion"),
    ],
)
def test_damaged_arrays_keep_what_was_read(tmp_path, tail, reason):
    data = '[{"text": "a"}, {"text": "b"}' + ("," if tail.startswith("{") else "") + tail
    (tmp_path / "a.json").write_bytes(data.encode("utf-8", "surrogateescape"))
    (shard,) = list_inputs([f"{tmp_path}/a.json"])
    *whole, last = (sample for sample, _ in read_samples(shard))
    if "decode" not in reason:  # a piece that is not UTF-8 is lost as a whole
        assert [sample.members["text"] for sample in whole] == ["a", "b"]
    assert last.damage.startswith("damaged JSON after") and reason in last.damage


def test_entries_that_are_no_objects_are_told(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, 5, {"text": "b"}]')
    assert list(scripts(tmp_path / "a.json").values()) == [
        ["document!: a"], "the entry is not a JSON object", ["document!: b"]
    ]  # fmt: skip


def test_a_large_array_is_not_held(tmp_path):
    """The first entry comes when little of the file is read."""
    write_entries(tmp_path / "a.json", [{"text": f"{i} " * 5000} for i in range(1000)])
    (shard,) = list_inputs([f"{tmp_path}/a.json"])
    positions = [position for _, position in read_samples(shard)]
    assert len(positions) == 1000 and positions[0] < shard.size / 10
    assert positions == sorted(positions) and positions[-1] == shard.size


# the whole of a worker's work


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_dualtoken(folder / "dualtoken")
    save_text_tokenizer(train_text_tokenizer(CAPTIONS, 300), folder / "text_tokenizer")
    return folder


def pipeline_config(tokenizers: Path, *overrides: str) -> PipelineConfig:
    return load_config(PipelineConfig, None, [
        f"dualtoken={tokenizers}/dualtoken", f"text_tokenizer={tokenizers}/text_tokenizer", "output=unused",
        "encode.batch_size=4", *overrides,
    ])  # fmt: skip


def encoded(config: PipelineConfig) -> tuple[list[Document], Counter]:
    """The documents of the config's inputs, and why other samples have none."""
    encoder, documents, reasons = Encoder(config, {}), [], Counter()
    for shard in list_inputs(config.inputs):
        for batch, _ in encoder.batches(shard):
            outcomes = [outcome for _, outcome in batch]
            reasons.update(str(outcome) for outcome in outcomes if isinstance(outcome, Exception))
            found = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
            documents += encoder.documents(encoder.encode(found), shard)
    return documents, reasons


EVERY = "A " + "".join(token for token in SPECIAL_TOKENS if token != "<image>")
EVERY_FORMAT = {
    "conversations": {"conversations": [{"from": "human", "value": f"<image>{EVERY}"}, {"from": "gpt", "value": EVERY}],
                      "image": "1.png"},
    "messages": {"messages": say(f"<image>{EVERY}", EVERY)},
    "cauldron": {"texts": [{"user": f"<image>{EVERY}", "assistant": EVERY}], "images": ["1.png"]},
    "interleaved": {"texts": [f"<image>{EVERY}", None, EVERY], "images": [None, "1.png", None]},
    "mmc4": mmc4([f"<image>{EVERY}", EVERY], ("1.png", 1)),
    "edit": {"original_image": "1.png", "edit_prompt": f"<image>{EVERY}", "edited_image": "2.png"},
    "edit_list": {"image_list": ["1.png", "2.png"], "instruction_list": [[f"<image>{EVERY}"]]},
    "pair": {"image": "1.png", "caption": [f"<image>{EVERY}", EVERY]},
    "text": {"text": f"<image>{EVERY}"},
}  # fmt: skip


@pytest.mark.parametrize("format", formats.FORMATS)
def test_text_that_spells_special_tokens_stays_text(tokenizers, tmp_path, format):
    """In every format: of all special ids only those of its images are in a document."""
    write_folder(tmp_path / "images", {"1.png": IMAGES[1], "2.png": IMAGES[2]})
    write_entries(tmp_path / "a.json", [EVERY_FORMAT[format]])
    inputs = [f"inputs=[{tmp_path}/a.json]", f"read.image_root={tmp_path}/images"]
    (document,), _ = encoded(pipeline_config(tokenizers, *inputs))
    tokenizer = load_text_tokenizer(tokenizers / "text_tokenizer")
    special = SpecialIds.of(tokenizer)
    ids = document.text_ids.tolist()
    assert document.meta["format"] == format
    assert (
        ids.count(special.image)
        == len(document.grids)
        == EVERY_FORMAT[format].__repr__().count(".png'") // (2 if format == "mmc4" else 1)
    )
    assert not ({*vars(special).values()} - {special.image}) & {*ids}
    text = tokenizer.decode([i for i in ids if i != special.image])
    assert text.count(EVERY) == repr(EVERY_FORMAT[format]).count("A <|endoftext|>")
    assert text.count("<image>") == (0 if format == "conversations" else 1)


def test_documents_carry_turns_and_uses(tokenizers, tmp_path):
    """What the trainer reads of a conversation, an edit and a pair of two captions."""
    write_folder(tmp_path / "images", {"1.png": IMAGES[1], "2.png": IMAGES[2]})
    samples = [
        {"messages": say("<image>Q", "A<image>", "R", "B"), "images": ["1.png", "2.png"]},
        {"image": "1.png", "caption": ["a cat", "a small tree"]},
        {"image": "1.png", "caption": ["a cat", "a small tree"]},
        {"image": "3.png", "caption": "a cat"},
    ]
    write_entries(tmp_path / "a.jsonl", samples)
    inputs = [f"inputs=[{tmp_path}/a.jsonl]", f"read.image_root={tmp_path}/images"]
    (chat, pair), reasons = encoded(pipeline_config(tokenizers, *inputs))
    assert chat.turns[:, 1:].tolist() == [
        [Role.USER, TurnBit.DROPPABLE], [Role.ASSISTANT, TurnBit.LOSS], [Role.USER, 0], [Role.ASSISTANT, TurnBit.LOSS]
    ]  # fmt: skip
    assert chat.turns[:, 0].tolist() == [2, 4, 5, 6]
    assert chat.image_use.tolist() == [ImageUse.LOOKED_AT | ImageUse.DROPPABLE, ImageUse.DRAWN]
    tokenizer = load_text_tokenizer(tokenizers / "text_tokenizer")
    assert pair.is_pair and [tokenizer.decode(ids) for ids in pair.captions()] == ["a cat", "a small tree"]
    assert reasons == {"duplicate": 1, f"no image '3.png' in read.image_root={tmp_path}/images": 1}


def test_the_commonest_reason_is_told(tmp_path):
    """Reasons that differ in names and numbers only count as one, and its first stands for them."""
    reasons = {"a": ["no image '1.png' in x", "2 <image> for 3 images"], "b": ["no image '2.png' in x", "empty"]}
    for folder, said in reasons.items():
        write_folder(tmp_path, {f"{folder}/bad.jsonl": "".join(quarantine_line("k", one) for one in said).encode()})
    markers = {"a": {"quarantined": 2}, "b": {"quarantined": 2}, "c": {"quarantined": 0}}
    assert commonest_reason(open_store(str(tmp_path)), markers) == "2 times \"no image '1.png' in x\""
    assert commonest_reason(open_store(str(tmp_path)), {"b": markers["b"]}).startswith('once "no image')


def test_the_page_shows_captions_and_turns(tokenizers, tmp_path):
    """Who speaks, what has a loss, what may be dropped; special tokens in a text are told from images."""
    write_entries(tmp_path / "a.jsonl", [
        {"image": DATA_URL, "caption": ["a cat", "a <image> tree"]},
        {"messages": say([{"type": "image", "image": DATA_URL}, {"type": "text", "text": "a > b"}], [IMAGE_PART]),
         "images": [DATA_URL]},
    ])  # fmt: skip
    (pair, edit), _ = encoded(pipeline_config(tokenizers, f"inputs=[{tmp_path}/a.jsonl]"))
    tokenizer = load_text_tokenizer(tokenizers / "text_tokenizer")

    def shown(document: Document) -> str:
        images = [Image.new("RGB", (2, 2))] * len(document.grids)
        page = browse.turns_as_html(document, images, tokenizer, SpecialIds.of(tokenizer).image)
        return re.sub('<img alt="" src="data:image/png;base64,[^"]+">', "IMAGE", page)

    assert shown(pair) == (
        '<section class="turn loss"><b>caption 1 of 2</b><figure class="either">IMAGE<figcaption>drawn or looked at'
        "</figcaption></figure><div>a cat</div></section>"
        '<section class="turn loss"><b>caption 2 of 2</b><div>a &lt;image&gt; tree</div></section>'
    )
    assert shown(edit) == (
        '<section class="turn droppable"><b>user</b><figure class="looked droppable">IMAGE<figcaption>looked at, '
        "may be dropped</figcaption></figure><div>a &gt; b</div></section>"
        '<section class="turn loss"><b>assistant</b><figure class="drawn">IMAGE<figcaption>drawn</figcaption></figure>'
        "</section>"
    )


def test_dry_run_says_what_each_input_is(tokenizers, tmp_path):
    write_entries(tmp_path / "chat.jsonl", [{"messages": say("Q", "A")}] * 20)
    write_entries(tmp_path / "mixed.json", [{"text": "a"}, {"text": "b"}, {"messages": [], "text": "c"}])
    (tmp_path / "none.jsonl").write_bytes(b"")
    plan_config = pipeline_config(tokenizers, f"inputs=['{tmp_path}/*.json*']", f"output={tmp_path}/set")
    said = describe(plan_config, make_plan(plan_config))
    assert "chat.jsonl  0.0 MB  to do: messages\n" in said
    assert "to do: 2 text, 1 unusable: it can be read as messages or as text; say which: read.format=messages\n" in said
    assert "none.jsonl  0.0 MB  to do: unusable: the file is empty: it has 0 bytes\n" in said


@pytest.mark.parametrize(
    "override, message",
    [
        ("read.image_root=nowhere", "read.image_root: 'nowhere' does not exist"),
        ("read.image_root=images.tar.gz", "unpack it to a plain .tar"),
        ("read.image_root=s4://bucket", "cannot be opened"),
        ("read.format=llava", "read.format 'llava' is unknown; known: auto, conversations"),
    ],
)
def test_wrong_settings_are_told_before_work_starts(tokenizers, tmp_path, override, message):
    write_json_lines(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(UserError, match=message):
        make_plan(pipeline_config(tokenizers, f"inputs=[{tmp_path}/a.jsonl]", f"output={tmp_path}/set", override))


def test_where_images_are_is_no_part_of_the_recipe(tokenizers):
    here, there = (pipeline_config(tokenizers, "inputs=[]", f"read.image_root={place}") for place in "ab")
    assert here.recipe() == there.recipe()
    assert here.recipe() != pipeline_config(tokenizers, "inputs=[]", "read.format=pair").recipe()
