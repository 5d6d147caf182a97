"""The pipeline before any encoding: which shards there are, what is in them, why a sample is unusable."""

import io
import json
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import pytest
from fsspec.exceptions import FSTimeoutError
from PIL import Image

from data_pipeline.config import EncodeConfig, FilterConfig, ReadConfig
from data_pipeline.decode import decode
from data_pipeline.documents import LeftOut, Unusable
from data_pipeline.formats import to_document
from data_pipeline.readers import RawSample, list_inputs, read_samples
from megadual.errors import UserError
from megadual.streams import ImageUse, Role, TurnBit
from megadual.synthetic.corpus import make_corpus
from megadual.synthetic.files import png_bytes, write_tar
from megadual.testing.raw import (
    plain_image,
    write_img2dataset_parquet,
    write_json_lines,
    write_pages_parquet,
    write_pages_tar,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, train=20, heldout=5, size=32)
    return folder


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def decoded(sample: RawSample, filters: FilterConfig | None = None, **read):
    return decode(to_document(sample, ReadConfig(**read)), filters or FilterConfig(), EncodeConfig())


def images(sample: RawSample) -> list[Image.Image]:
    return [part.image for part in decoded(sample).images]


def test_inputs_are_named_below_their_fixed_folder(tmp_path):
    touch(tmp_path, "a/0.tar", "a/1.tar", "b/0.tar")
    names = [shard.name for shard in list_inputs([f"{tmp_path}/*/*.tar"])]
    assert names == ["a--0", "a--1", "b--0"]
    assert [shard.name for shard in list_inputs([f"{tmp_path}/a/{{0..1}}.tar", f"{tmp_path}/a/*.tar"])] == ["0", "1"]
    assert [shard.url for shard in list_inputs([f"file://{tmp_path}/b/*.tar"])] == [f"file://{tmp_path}/b/0.tar"]


@pytest.mark.parametrize(
    "patterns, message",
    [
        (["{folder}/*.tar"], "matches no file"),
        (["{folder}/a/{{0..3}}.tar"], "a/2.tar' matches no file"),
        (["{folder}/a/*.tar", "{folder}/b/*.tar"], "would both become '0'"),
        (["{folder}/a/{{0..3.tar"], "braces"),
        (["{folder}/a/notes.txt"], "is none of .tar"),
        (["ftp://127.0.0.1:1/a.tar"], "a.tar' cannot be opened: .*refused"),
        ([], "the list is empty"),
    ],
)
def test_wrong_inputs_are_refused(tmp_path, patterns, message):
    touch(tmp_path, "a/0.tar", "a/1.tar", "b/0.tar", "a/notes.txt")
    with pytest.raises(UserError, match=message):
        list_inputs([pattern.format(folder=tmp_path) for pattern in patterns])


def test_every_kind_of_broken_sample_has_its_reason(corpus):
    (shard,) = list_inputs([f"{corpus}/broken-*.tar"])
    good, reasons = 0, {}
    for sample, _ in read_samples(shard):
        try:
            decoded(sample)
            good += 1
        except Unusable as reason:
            reasons[sample.key.split("/")[1]] = str(reason)
    assert good == 12
    expected = {
        "truncated-image": "broken", "missing-caption": "none of txt", "empty-caption": "empty",
        "caption-not-utf8": "not UTF-8", "zero-byte-image": "0 bytes", "not-an-image": "not an image",
        "missing-image": "none of png", "huge-image": "too large",
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    for key, words in expected.items():
        assert words in reasons[key]


def test_damaged_tar_keeps_what_was_read(corpus, tmp_path):
    whole = (corpus / "train-00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 100])
    (tmp_path / "garbage.tar").write_bytes(b"no tar at all " * 100)
    cut, garbage = list_inputs([f"{tmp_path}/*.tar"])
    samples = [sample for sample, _ in read_samples(cut)]
    assert [bool(sample.damage) for sample in samples] == [False] * (len(samples) - 1) + [True]
    assert 5 < len(samples) < 20
    assert samples[0].key == "cut/train-000000"
    assert [sample.damage != "" for sample, _ in read_samples(garbage)] == [True]


MEMBERS = [(f"{number}.txt", b"x" * 600) for number in range(20)]
HEADER = 10 * 3 * 512  # where the header of 10.txt begins: a header and two blocks of data each


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda tar: tar[: HEADER + 8] + b"?" + tar[HEADER + 9 :], "bad checksum"),
        (lambda tar: tar[:HEADER], "no end marker"),
        (lambda tar: tar[: HEADER + 100], "truncated header"),
        (lambda tar: tar[: HEADER + 700], "unexpected end of data"),
        (lambda tar: tar[:HEADER] + bytes(512) + tar[HEADER + 512 :], "more behind the end marker"),
    ],
    ids=["checksum", "cut at a header", "cut in a header", "cut in data", "zeroed header"],
)
def test_every_damage_of_a_tar_is_told(tmp_path, damage, reason):
    """Also what tarfile takes for the end of a tar; and always in the same words."""
    write_tar(tmp_path / "a.tar", MEMBERS)
    (tmp_path / "a.tar").write_bytes(damage((tmp_path / "a.tar").read_bytes()))
    (shard,) = list_inputs([f"{tmp_path}/*.tar"])
    *samples, last = (sample for sample, _ in read_samples(shard))
    assert len(samples) == 10
    assert not any(sample.damage for sample in samples)
    assert re.fullmatch(f"damaged tar: .*({reason})", last.damage)


def test_whole_tar_is_not_called_damaged(tmp_path):
    """Long names have headers of their own, and some tools pad a tar with more zeros."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in [("n" * 150 + ".txt", b"a"), ("\xe9.txt", b"b"), ("__notes__/x.txt", b"c")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue() + bytes(3 << 20))
    (shard,) = list_inputs([f"{tmp_path}/*.tar"])
    assert [sample.members for sample, _ in read_samples(shard)] == [{"txt": b"a"}, {"txt": b"b"}]


class Dropped(io.FileIO):
    """A file whose connection breaks behind its first bytes."""

    def read(self, *size):
        if self.tell() > 2000:
            raise self.error
        return super().read(*size)


@pytest.mark.parametrize("error", [FSTimeoutError(), ConnectionError("reset"), EOFError(), RuntimeError("of a store")])
@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.jsonl.gz"])
def test_failed_read_is_no_damage(tmp_path, monkeypatch, name, error):
    """It is raised, for another attempt: a shard must not be committed without the samples behind it."""
    noise = random.Random(0).randbytes
    path = tmp_path / name
    if name == "a.tar":
        write_tar(path, [(f"{number}.txt", noise(600)) for number in range(200)])
    elif name == "a.parquet":
        write_img2dataset_parquet(path, rows=250)
    else:
        write_json_lines(path, [noise(600).hex() for _ in range(400)])
    (shard,) = list_inputs([str(path)])
    file = Dropped(path)
    file.error = error
    monkeypatch.setattr(fsspec, "open", lambda url, mode: file)
    with pytest.raises(type(error)):
        list(read_samples(shard))


def test_read_errors_are_raised(tmp_path):
    (tmp_path / "folder.tar").mkdir()
    (shard,) = list_inputs([f"{tmp_path}/*.tar"])
    with pytest.raises(OSError):
        list(read_samples(shard))


def test_caption_from_a_json_field():
    members = {"png": png_bytes(Image.new("RGB", (32, 32))), "json": json.dumps({"text": " a cat "}).encode()}
    assert decoded(RawSample("k", members), captions=["json:text"]).texts == ["a cat"]
    for members["json"] in (b"{}", b"[1]", b"no json", b'{"text": 5}'):
        with pytest.raises(Unusable):
            decoded(RawSample("k", members), captions=["json:text"])


@pytest.mark.parametrize(
    "size, caption, filter",
    [
        ((8, 32), "a cat", "min_side"),
        ((32, 160), "a cat", "max_aspect"),
        ((32, 32), "cat", "min_caption"),
        ((32, 32), "a cat " * 5, "max_caption"),
    ],
)
def test_filters(size, caption, filter):
    sample = RawSample("k", {"png": png_bytes(Image.new("RGB", size)), "txt": caption.encode()})
    with pytest.raises(LeftOut, match=filter):
        decoded(sample, FilterConfig(min_side=16, max_aspect=4, min_caption=4, max_caption=20))


def test_transparency_is_put_on_white_and_rotation_applied():
    clear = png_bytes(Image.new("RGBA", (32, 32), (0, 0, 0, 0)))
    (image,) = images(RawSample("k", {"png": clear, "txt": b"x"}))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (32, 48)).save(buffer, "JPEG", exif=exif)
    (image,) = images(RawSample("k", {"jpg": buffer.getvalue(), "txt": b"x"}))
    assert image.size == (48, 32)


def test_too_many_pixels_are_refused_before_decoding():
    sample = RawSample("k", {"png": png_bytes(Image.new("RGB", (64, 64))), "txt": b"x"})
    with pytest.raises(Unusable, match="64 x 64 pixels"):
        decode(to_document(sample, ReadConfig()), FilterConfig(), EncodeConfig(max_pixels=4095))


def test_duplicate_member_is_damage_not_a_crash(tmp_path):
    write_tar(tmp_path / "twice.tar", [("a.txt", b"1"), ("a.txt", b"2"), ("b.txt", b"3")])
    (shard,) = list_inputs([f"{tmp_path}/*.tar"])
    samples = [sample for sample, _ in read_samples(shard)]
    assert [sample.key for sample in samples if not sample.damage] == ["twice/a", "twice/b"]


@pytest.mark.parametrize("place", ["path", "cwd"])
def test_tokenize_becomes_the_standard_module(place):
    """Python itself imports `tokenize`: also with the pipeline's folder in front it must get the library's."""
    program = "import tokenize, linecache; print(tokenize.open.__module__, hasattr(tokenize, 'generate_tokens'))"
    folder = str(ROOT / "data_pipeline")
    options = {"env": {"PYTHONPATH": folder}} if place == "path" else {"cwd": folder}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, **options)
    assert done.stdout.split() == ["tokenize", "True"]


def outcomes(shard, **filters) -> dict[str, str]:
    """Key (without the shard's name) -> format, or the reason why there is no document."""
    said = {}
    for sample, _ in read_samples(shard):
        try:
            said[sample.key.partition("/")[2]] = decoded(sample, FilterConfig(**filters)).meta["format"]
        except (Unusable, LeftOut) as reason:
            said[sample.key.partition("/")[2]] = str(reason)
    return said


def test_parquet_of_img2dataset(tmp_path):
    write_img2dataset_parquet(tmp_path / "00000.parquet", rows=250, not_downloaded=(3, 249))
    (shard,) = list_inputs([f"{tmp_path}/*.parquet"])
    said = outcomes(shard)
    assert len(said) == 250 and said["000000003"] == said["000000249"] == "not_downloaded"
    assert list(said.values()).count("pair") == 248
    samples = list(read_samples(shard))
    assert [position for _, position in samples] == sorted(position for _, position in samples)
    assert samples[-1][1] == shard.size
    assert decoded(samples[5][0]).texts == ["plain picture 5"]


def test_damaged_parquet_keeps_what_was_read(tmp_path):
    write_img2dataset_parquet(tmp_path / "whole.parquet", rows=250)
    data = bytearray((tmp_path / "whole.parquet").read_bytes())
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    (tmp_path / "holed.parquet").write_bytes(data)
    (tmp_path / "whole.parquet").unlink()
    cut, holed = list_inputs([f"{tmp_path}/*.parquet"])
    assert [sample.damage[:15] for sample, _ in read_samples(cut)] == ["damaged parquet"]
    samples = [sample for sample, _ in read_samples(holed)]
    assert 64 <= len(samples) < 250 and samples[-1].damage.startswith("damaged parquet after")


PAGE = ["A cat", plain_image(1), "and a dog,\nboth small.", plain_image(2), plain_image(3, (8, 8))]


@pytest.mark.parametrize("write, suffix", [(write_pages_tar, "tar"), (write_pages_parquet, "parquet")])
def test_interleaved_documents_keep_their_order(tmp_path, write, suffix):
    write(tmp_path / f"pages.{suffix}", [PAGE, ["only text"], [plain_image(1), b"no image"], [plain_image(4)]])
    (shard,) = list_inputs([f"{tmp_path}/pages.*"])
    first, second, broken, bare = (sample for sample, _ in read_samples(shard))
    page = decoded(first)
    (turn,) = page.turns
    assert (turn.role, turn.bits) == (Role.DOCUMENT, TurnBit.LOSS)
    assert {part.use for part in page.images} == {ImageUse.EITHER}
    assert [part if isinstance(part, str) else part.image.getpixel((0, 0)) for part in turn.parts] == [
        "A cat", (37, 101, 59), "and a dog,\nboth small.", (74, 202, 118)
    ]  # fmt: skip
    assert page.left_out_images == {"min_side": 1} and page.meta["sizes"] == [[32, 32], [32, 32]]
    assert decoded(second).texts == ["only text"]
    with pytest.raises(Unusable, match="not an image"):
        decoded(broken)
    with pytest.raises(LeftOut, match="min_text"):
        decoded(bare)


@pytest.mark.parametrize(
    "lists, reason",
    [
        ({"texts": ["a"], "images": []}, "1 texts beside 0 images"),
        ({"texts": ["a"], "images": ["0.png"]}, "place 0 must hold either"),
        ({"texts": [None], "images": [None]}, "place 0 must hold either"),
        ({"texts": [None], "images": ["1.png"]}, "no image '1.png' in the sample"),
        ({"texts": [5], "images": [None]}, "is int, not a string"),
        (["texts"], "no known format: it holds 0.png, json"),
    ],
)
def test_wrong_lists_of_an_interleaved_document(lists, reason):
    with pytest.raises(Unusable, match=reason):
        decoded(RawSample("k", {"json": json.dumps(lists).encode(), "0.png": plain_image(0)}))


@pytest.mark.parametrize("name", ["text.jsonl", "text.jsonl.gz"])
def test_json_lines(tmp_path, name):
    write_json_lines(tmp_path / name, ["first", "", "third"])
    (shard,) = list_inputs([f"{tmp_path}/text.jsonl*"])
    assert shard.name == "text"
    assert outcomes(shard) == {"00000000": "text", "00000001": "the text is empty", "00000002": "text"}


def test_damaged_json_lines(tmp_path):
    deep = b"[" * 100_000
    lines = [b'{"text": "good"}', b"{", b"[1]", b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"txt": "x"}', deep]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    write_json_lines(tmp_path / "b.jsonl.gz", [f"line {i * i}" for i in range(1000)])
    data = (tmp_path / "b.jsonl.gz").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(data[: len(data) // 2])
    plain, cut = list_inputs([f"{tmp_path}/*.jsonl*"])
    said = list(outcomes(plain).values())
    assert said[0] == "text"
    expected = ["not JSON", "not a JSON object", "not JSON", "not UTF-8", "no image", "not JSON"]
    for reason, words in zip(said[1:], expected, strict=True):
        assert words in reason
    samples = [sample for sample, _ in read_samples(cut)]
    assert 10 < len(samples) < 1000 and "damaged gzip after" in samples[-1].damage


def test_any_fsspec_url_is_read(tmp_path):
    write_pages_tar(tmp_path / "pages.tar", [PAGE])
    fsspec.filesystem("memory").pipe_file("/corpus/a/pages.tar", (tmp_path / "pages.tar").read_bytes())
    (shard,) = list_inputs(["memory://corpus/*/pages.tar"])
    assert shard.name == "a--pages" and shard.size > 0
    assert outcomes(shard) == {"page-0000": "interleaved"}


def test_same_image_and_text_is_one_document():
    read = ReadConfig()

    def digest(caption: bytes, i: int) -> bytes:
        return to_document(RawSample("k", {"png": plain_image(i), "txt": caption}), read).digest()

    assert digest(b"a", 1) == digest(b" a\n", 1)
    assert len({digest(b"a", 1), digest(b"b", 1), digest(b"a", 2)}) == 3
