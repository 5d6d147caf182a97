"""The pipeline before any encoding: which shards there are, what is in them, why a sample is unusable."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.config import EncodeConfig, FilterConfig, ReadConfig
from data_pipeline.decode import LeftOut, Unusable, decode
from data_pipeline.readers import RawSample, list_inputs, read_samples
from megadual.errors import UserError
from megadual.testing.corpus import make_corpus, png_bytes, write_tar

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


def decoded(sample: RawSample, filters: FilterConfig | None = None, caption: str = "txt"):
    return decode(sample, ReadConfig(caption=caption), filters or FilterConfig(), EncodeConfig())


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
        (["{folder}/a/notes.txt"], "is no .tar"),
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
        "truncated-image": "broken", "missing-caption": "no .txt", "empty-caption": "empty",
        "caption-not-utf8": "not UTF-8", "zero-byte-image": "0 bytes", "not-an-image": "not an image",
        "missing-image": "none of .png", "huge-image": "too large",
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


def test_read_errors_are_raised(tmp_path):
    (tmp_path / "folder.tar").mkdir()
    (shard,) = list_inputs([f"{tmp_path}/*.tar"])
    with pytest.raises(OSError):
        list(read_samples(shard))


def test_caption_from_a_json_field():
    members = {"png": png_bytes(Image.new("RGB", (32, 32))), "json": json.dumps({"text": " a cat "}).encode()}
    assert decoded(RawSample("k", members), caption="json:text").caption == "a cat"
    for members["json"] in (b"{}", b"[1]", b"no json", b'{"text": 5}'):
        with pytest.raises(Unusable):
            decoded(RawSample("k", members), caption="json:text")


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
    image = decoded(RawSample("k", {"png": png_bytes(Image.new("RGBA", (32, 32), (0, 0, 0, 0))), "txt": b"x"})).image
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (32, 48)).save(buffer, "JPEG", exif=exif)
    assert decoded(RawSample("k", {"jpg": buffer.getvalue(), "txt": b"x"})).image.size == (48, 32)


def test_too_many_pixels_are_refused_before_decoding():
    sample = RawSample("k", {"png": png_bytes(Image.new("RGB", (64, 64))), "txt": b"x"})
    with pytest.raises(Unusable, match="64 x 64 pixels"):
        decode(sample, ReadConfig(), FilterConfig(), EncodeConfig(max_pixels=4095))


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
