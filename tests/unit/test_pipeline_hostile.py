"""Inputs that are broken or made to harm: what each costs, and that it takes no memory."""

import bz2
import gzip
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image, UnidentifiedImageError
from pyarrow import parquet

from data_pipeline import bounded_json
from data_pipeline.config import EncodeConfig, FilterConfig, ReadConfig
from data_pipeline.decode import decode
from data_pipeline.documents import LeftOut, Unusable
from data_pipeline.formats import to_document
from data_pipeline.image_root import ImageRoot
from data_pipeline.readers import list_inputs, read_samples
from data_pipeline.writer import quarantine_line
from megadual.errors import UserError
from megadual.images import open_image
from megadual.testing.raw import plain_image
from megadual.vision.data import shard_samples

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1 << 20
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"

# tars: whole samples `a` and `c`, and what is between them


def header(name: str, size: int, type: bytes = b"0", **fields: bytes) -> bytes:
    """One header of a tar; `fields`: at_OFFSET=bytes."""
    info = tarfile.TarInfo(name)
    info.type = type
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    for place, data in fields.items():
        begin = int(place.removeprefix("at_"))
        block[begin : begin + len(data)] = data
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(block)[0]
    return bytes(block)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + bytes(-len(data) % 512)


def pair(key: str, number: int) -> bytes:
    return member(f"{key}.png", plain_image(number)) + member(f"{key}.txt", f"picture {number}".encode())


def tar(*between: bytes) -> bytes:
    return pair("a", 1) + b"".join(between) + pair("c", 3) + bytes(1024)


def image_b(data: bytes, suffix: str = "jpg") -> bytes:
    return tar(member(f"b.{suffix}", data), member("b.txt", b"a picture"))


def json_b(text: str) -> bytes:
    return tar(member("b.png", plain_image(2)), member("b.json", text.encode()))


def number(value: int) -> bytes:
    return tarfile.itn(value, 12, tarfile.GNU_FORMAT)


def pax(**records: str) -> bytes:
    info = tarfile.TarInfo("b.png")
    info.pax_headers = {name.replace("__", "."): value for name, value in records.items()}
    return info.tobuf(tarfile.PAX_FORMAT)[:-512]  # without the member's own header


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return buffer.getvalue()[:1000]


def huge_png() -> bytes:
    image = bytearray(plain_image(1))
    image[16:24] = (60_000).to_bytes(4, "big") * 2
    image[29:33] = zlib.crc32(image[12:29]).to_bytes(4, "big")
    return bytes(image)


SPARSE = header("b.png", 0, b"S", at_386=number(0), at_398=number(0), at_483=number(6 << 30))
PAX_SPARSE = pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize=str(6 << 30))
TARS = {
    # name: (bytes, what becomes of it: a word of `b`'s reason, or of the whole rest's)
    "gzip": (gzip.compress(tar()), "all: compressed .gzip.*unpack it"),
    "bzip2": (bz2.compress(tar()), "all: compressed .bzip2"),
    "xz": (lzma.compress(tar()), "all: compressed .xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(2000), "all: compressed .zstd"),
    "text file": (b"this is no tar\n" * 100, "all: damaged tar"),
    "0 bytes": (b"", "all: 0 bytes"),
    "zeros without an end": (bytes(100), "all: damaged tar: truncated header"),
    "sparse member": (tar(SPARSE, member("b.txt", b"x")), "b: sparse"),
    "sparse member of pax": (tar(PAX_SPARSE, member("b.png", b"0\n"), member("b.txt", b"x")), "b: sparse"),
    "large member": (image_b(bytes(LIMIT + 1)), "b: more than max_bytes=1048576"),
    "many members": (
        tar(member("b.txt", b"x"), *(member(f"b.{i}.png", bytes(LIMIT // 4)) for i in range(5))),
        "b: more than max_bytes",
    ),
    "header of GBs": (tar(header("b", 1 << 34, b"L")), "rest: header that says to have 17179869184 bytes"),
    "pax header of GBs": (tar(header("b", 1 << 40, b"x")), "rest: header that says"),
    "negative size": (tar(header("b.png", -1 << 40)), "rest: header that says"),
    "numbers that are none": (tar(pax(GNU__sparse__map="1,x"), member("b.png", b"")), "rest: damaged tar"),
    "suffix that is not UTF-8": (
        tar(header("b.png", 1, at_0=b"b.p\xff") + b"x" + bytes(511)), r"b: no known format: it holds .*p\\udcff"
    ),
    "key twice": (tar(member("b.txt", b"1"), member("b.txt", b"2")), "b: no image"),
    "EPS named .jpg": (image_b(EPS), "b: not an image of any of read.image_formats"),
    "a text named .jpg": (image_b(b"an image"), "b: not an image"),
    "0-byte image": (image_b(b""), "b: 0 bytes"),
    "huge PNG": (image_b(huge_png(), "png"), "b: too large|pixels"),
    "truncated JPEG": (image_b(truncated_jpeg()), "b: broken"),
    "deep JSON": (json_b('{"texts": ' + "[" * 50_000), "b: its .json is not JSON"),
    "JSON of too many values": (json_b(f'{{"texts": [{"[]," * 5000}0]}}'), "b: its .json is not JSON"),
    "half a pair as a name": (
        json_b(json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "url": "\ud800"}]}]})),
        r"b: no image '\\ud800'",
    ),
    "caption not UTF-8": (tar(member("b.png", plain_image(2)), member("b.txt", b"\xff")), "b: not UTF-8"),
}  # fmt: skip


def outcomes(path: Path, limit: int = LIMIT, **read) -> list[tuple[str, str]]:
    """(key, format or reason) of each sample, the reason as it comes back from the quarantine's line."""
    (shard,) = list_inputs([str(path)])
    settings, said = ReadConfig(**read), []
    for sample, _ in read_samples(shard, limit):
        try:
            document = to_document(sample, settings)
            document = decode(document, FilterConfig(), EncodeConfig(), settings.image_formats)
            line = quarantine_line(sample.key, document.meta["format"])
        except (Unusable, LeftOut) as reason:
            line = quarantine_line(sample.key, str(reason))
        entry = json.loads(line.encode())
        said.append((entry["key"].partition("/")[2], entry["reason"]))
    return said


@pytest.fixture(autouse=True)
def few_values(monkeypatch):
    monkeypatch.setattr(bounded_json, "MARKS", 4096)


@pytest.mark.parametrize("data, expected", TARS.values(), ids=TARS)
def test_hostile_tar(tmp_path, data, expected):
    (tmp_path / "x.tar").write_bytes(data)
    said = outcomes(tmp_path / "x.tar", LIMIT if "max_bytes" in expected else 1 << 27)
    what, _, words = expected.partition(": ")
    whole = [(key, "pair") for key in ("a" if what == "rest" else "ac" if what == "b" else "")]
    assert [entry for entry in said if entry[1] == "pair"] == whole
    reasons = [entry for entry in said if entry[1] != "pair"]
    assert reasons[0][0] == ("b" if what == "b" else "") and re.search(words, reasons[0][1]), reasons
    assert len(reasons) == 1 + ("duplicate file name" in reasons[-1][1])


def test_refused_member_is_left_out_of_training_images(tmp_path):
    (tmp_path / "x.tar").write_bytes(TARS["sparse member"][0])
    with pytest.warns(UserWarning, match="sample 'b': 'b.png' is sparse"):
        assert [sample["__key__"] for sample in shard_samples([str(tmp_path / "x.tar")])] == ["a", "c"]


# JSON, one object a line: good, bad, good; or an array of the same

TEXT = '{"text": "good"}'
LINES = {
    "long line": ('{"text": "' + "x" * LIMIT + '"}', "more than read.max_bytes=1048576 bytes"),
    "deep": ("[" * 3000, "not JSON: .*recursion"),
    "deep and closed": ('{"text": ' + "[" * 900 + "]" * 900 + "}", "text is list"),
    "long number": ('{"text": ' + "1" * 5000 + "}", "not JSON: .*4300"),
    "not a number": ('{"text": NaN}', "the text is float"),
    "infinite": ('{"text": 1e999}', "the text is float"),
    "half a pair": (r'{"text": "\ud800"}', "not UTF-8"),
    "half a pair as a role": (r'{"messages": [{"role": "\udfff", "content": "x"}]}', "unknown role"),
    "half a pair as a field": (r'{"\udfff": "x"}', r"it holds \\udfff"),
    "NUL": ('{"text": "x"}\0', "not JSON"),
    "cut": ('{"text": "x', "not JSON"),
    "no object": ("[1]", "not a JSON object"),
    "null": ('{"text": null, "messages": [null]}', "'messages' holds null"),
    "list where a number should be": (
        '{"messages": [{"role": "user", "content": [{"type": "image", "index": [1]}]}], "images": ["1.png"]}',
        "can't be laid out: TypeError: unhashable",
    ),
    "object where a text should be": ('{"messages": [{"role": "user", "content": {"a": 1}}]}', "is dict, not a string"),
    "key of another kind": ('{"conversations": [{"from": 5, "value": 6}]}', "is int, not a string"),
}  # fmt: skip


@pytest.mark.parametrize("line, reason", LINES.values(), ids=LINES)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_hostile_line_costs_itself(tmp_path, suffix, line, reason):
    data = f"{TEXT}\n{line}\n{TEXT}\n".encode()
    (tmp_path / f"x.{suffix}").write_bytes(gzip.compress(data, 1) if suffix.endswith("gz") else data)
    first, bad, last = outcomes(tmp_path / f"x.{suffix}")
    assert (first, last) == (("00000000", "text"), ("00000002", "text"))
    assert bad[0] == "00000001" and re.search(reason, bad[1])


ARRAYS = {
    "deep": (f"[{TEXT}, {'[' * 3000}", 1, "damaged JSON after 1 entries: .*recursion"),
    "long entry": (f'[{TEXT}, {{"text": "{"x" * 3 * LIMIT}"}}, {TEXT}]', 1, "more than read.max_bytes=1048576"),
    "too many values": (f'[{TEXT}, {{"text": [{"[]," * 5000}0]}}, {TEXT}]', 1, "values"),
    "no end": (f"[{TEXT}, {TEXT}", 2, "the end where"),
    "much space": (f"[{TEXT},{' ' * 5 * LIMIT}{TEXT}]", 2, ""),
    "text": ("not JSON at all", 0, "the line is not JSON"),
    "0 bytes": ("", 0, "0 bytes"),
}


@pytest.mark.parametrize("text, whole, reason", ARRAYS.values(), ids=ARRAYS)
def test_hostile_array(tmp_path, text, whole, reason):
    (tmp_path / "x.json").write_text(text)
    said = outcomes(tmp_path / "x.json")
    assert [what for _, what in said[:whole]] == ["text"] * whole
    assert re.search(reason, said[whole][1]) and len(said) == whole + 1 if reason else len(said) == whole


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json.gz", "x.parquet", "x.tar"])
def test_file_of_0_bytes_is_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert outcomes(tmp_path / name) == [("", "the file is empty: it has 0 bytes")]


# parquet: three rows, of which the second is odd; or a whole file


def rows(second, type: pa.DataType, name: str = "other") -> pa.Table:
    return pa.table({"text": ["good"] * 3, name: pa.array([None, second, None], type)})


def not_utf8(value: bytes) -> pa.Table:
    column = pa.array([b"x", value, b"x"], pa.binary()).view(pa.string())
    return pa.table({"text": column})


ROWS = {
    "text not UTF-8": (not_utf8(b"\xff"), "can't be read: .*utf-8"),
    "date beyond the calendar": (rows(1 << 60, pa.timestamp("us")), "can't be read"),
    "bytes that are no text": (pa.table({"text": pa.array([b"x", b"\xff", b"x"])}), "not UTF-8"),
    "null text": (pa.table({"text": ["x", None, "x"]}), "no known format"),
    "image of null": (
        pa.table({"image": [{"bytes": plain_image(i)} if i != 1 else None for i in range(3)], "caption": ["x"] * 3}),
        "null",
    ),
    "nested nulls": (
        pa.table({"messages": [[{"role": r, "content": "x"} if i != 1 else None for r in ("user", "assistant")]
                               for i in range(3)]}),
        "holds null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("table, reason", ROWS.values(), ids=ROWS)
def test_odd_row_costs_itself(tmp_path, table, reason):
    parquet.write_table(table, tmp_path / "x.parquet")
    first, odd, last = outcomes(tmp_path / "x.parquet")
    assert first[1] == last[1] != odd[1] and odd[0] == "00000001" and re.search(reason, odd[1])


@pytest.mark.parametrize(
    "keys",
    [pa.array([float("nan"), 1.5, None]), pa.array([b"\xff", b"", b"k"]), pa.array([[1], [], None]), ["", "", ""]],
)
def test_keys_that_are_no_names_are_numbers(tmp_path, keys):
    parquet.write_table(pa.table({"text": ["good"] * 3, "key": keys}), tmp_path / "x.parquet")
    assert outcomes(tmp_path / "x.parquet") == [(f"0000000{i}", "text") for i in range(3)]


def test_row_group_that_grows_costs_itself(tmp_path):
    """What is left of it is counted on: rows behind it keep their numbers."""
    with parquet.ParquetWriter(tmp_path / "x.parquet", pa.schema({"text": pa.string()}), compression="zstd") as writer:
        for text in ("good", "x" * 8 * LIMIT, "good"):
            writer.write_table(pa.table({"text": [text] * 2}))
    said = outcomes(tmp_path / "x.parquet")
    assert [key for key, _ in said] == ["00000000", "00000001", "00000002", "00000004", "00000005"]
    assert re.search(r"row group 1 with its 2 rows is refused: .*read.max_bytes=1048576", said[2][1])


def varint(number: int, least: int = 1) -> bytes:
    """As a parquet file's footer has whole numbers, in at least so many bytes."""
    septets = [number << 1 >> shift & 127 for shift in range(0, max(number.bit_length() + 1, 7 * least), 7)]
    return bytes([*(each | 128 for each in septets[:-1]), septets[-1]])


def parts(path: Path) -> tuple[bytes, bytes]:
    """A parquet file's data and footer."""
    data = path.read_bytes()
    end = len(data) - int.from_bytes(data[-8:-4], "little") - 8
    return data[:end], data[end:]


@pytest.mark.parametrize("place, rows, reason", [
    (1, 0, "row group 0 with its 777 rows is damaged: its data has 0"),  # values of the column
    (1, 3, "row group 0 with its 777 rows is damaged: column 'text' has 3"),
    (3, 3, "row group 0 with its 3 rows is damaged: column 'text' has 777"),  # rows of the row group
])  # fmt: skip
def test_rows_that_a_footer_hides_are_told(tmp_path, place, rows, reason):
    parquet.write_table(pa.table({"text": ["good"] * 777}), tmp_path / "x.parquet")
    data, footer = parts(tmp_path / "x.parquet")
    pieces = footer.split(varint(777))
    pieces[place : place + 2] = [pieces[place] + varint(rows, 2) + pieces[place + 1]]
    (tmp_path / "x.parquet").write_bytes(data + varint(777).join(pieces))
    assert outcomes(tmp_path / "x.parquet")[-1][1] == reason


PARQUETS = {
    "too many columns": (lambda path: parquet.write_table(pa.table({f"c{i}": [1] for i in range(5000)}), path), "5000"),
    "text": (lambda path: path.write_text("this is no parquet"), "damaged parquet after 0 rows"),
    "end without a beginning": (lambda path: path.write_bytes(b"\xff" * 1000 + b"\xe8\3\0\0PAR1"), "damaged parquet"),
}


@pytest.mark.parametrize("write, reason", PARQUETS.values(), ids=PARQUETS)
def test_hostile_parquet(tmp_path, write, reason):
    write(tmp_path / "x.parquet")
    ((key, said),) = outcomes(tmp_path / "x.parquet")
    assert key == "" and re.search(reason, said)


# files that are none, names, images


def test_what_can_be_no_input_is_told_before_work(tmp_path):
    (tmp_path / "link.tar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    pipe = tmp_path / "pipe.tar"
    subprocess.run(["mkfifo", str(pipe)], check=True)
    name = b"\xff.jsonl".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_text(TEXT)
    for pattern, words in {
        "link.tar": "a link that leads nowhere", "pipe.tar": "is no file", "x.tar.gz": "unpack it",
        "?.jsonl": "not UTF-8; rename it", "{0..99999999999}.tar": "more than 10000000 numbers",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words):
            list_inputs([f"{tmp_path}/{pattern}"])


@pytest.mark.parametrize("name", ["\ud800.png", "https://x/\ud800", "a" * 5000 + ".png", "\0.png", "big.png"])
def test_hostile_image_name_costs_its_sample(tmp_path, name):
    (tmp_path / "big.png").write_bytes(bytes(2000))
    root = ImageRoot(str(tmp_path), limit=1999)
    with pytest.raises(Unusable):
        root.reader(name)()


def test_only_formats_that_are_meant_are_decoded(tmp_path, monkeypatch):
    """An EPS starts another program, whatever it is named."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "x.jpg").write_bytes(EPS)
    with pytest.raises(UnidentifiedImageError):
        open_image(tmp_path / "x.jpg").load()
    bitmap = io.BytesIO()
    Image.new("RGB", (32, 32)).save(bitmap, "BMP")
    (tmp_path / "x.tar").write_bytes(image_b(bitmap.getvalue()))
    assert [what for _, what in outcomes(tmp_path / "x.tar")] == ["pair"] * 3
    kinds = [what for _, what in outcomes(tmp_path / "x.tar", image_formats=["PNG"])]
    assert kinds == ["pair", "not an image of any of read.image_formats", "pair"]


# memory

PROGRAM = """
import re, resource, sys
from pathlib import Path
from data_pipeline.readers import list_inputs, read_samples
# getrusage's peak of this process would be that of the one that started it.
own = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
children = lambda: resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
before = own()  # which is what children begin with
for shard in list_inputs(sys.argv[1:]):
    for sample, _ in read_samples(shard, 1 << 24):
        pass
    print(shard.name, own() - before, children() - before, sample.damage, sep="\t")
"""


def bomb(value: str, times: int) -> bytes:
    """A gzip of so many times a text, of which each is a stream of its own."""
    return gzip.compress(value.encode(), 1) * times


def understate(path: Path, copy: Path) -> None:
    """A copy of a parquet file of one row group, whose footer says that all sizes before compression are 100 bytes."""
    (data, footer), group = parts(path), parquet.read_metadata(path).row_group(0)
    for size in {group.total_byte_size, *(group.column(i).total_uncompressed_size for i in range(group.num_columns))}:
        footer = footer.replace(varint(size), varint(100, len(varint(size))))
    copy.write_bytes(data + footer)
    assert parquet.read_metadata(copy).row_group(0).total_byte_size == 100


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_bombs_take_no_memory(tmp_path):
    """Each is small, and would take from 160 MB to 6 GB if it were read as it says it is, or says less than it is."""
    zeros = "0" * (1 << 20)
    (tmp_path / "line.jsonl.gz").write_bytes(bomb(zeros, 160))
    (tmp_path / "values.jsonl.gz").write_bytes(gzip.compress(b"[", 1) + bomb("[]," * (1 << 16), 80))
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(b'["', 1) + bomb(zeros, 160))
    (tmp_path / "space.json.gz").write_bytes(gzip.compress(b"[", 1) + bomb(" " * (1 << 20), 160) + gzip.compress(b"]"))
    (tmp_path / "compressed.tar").write_bytes(gzip.compress(header("b.png", 160 << 20), 1) + bomb(zeros, 161))
    (tmp_path / "sparse.tar").write_bytes(tar(SPARSE))
    with open(tmp_path / "holes.tar", "wb") as file:
        file.write(header("b.png", 160 << 20))
        file.truncate(512 + (160 << 20) + 1024)
    parquet.write_table(pa.table({"text": ["x" * (160 << 20)]}), tmp_path / "page.parquet", compression="zstd")
    value = "x" * (1 << 22)
    parquet.write_table(pa.table({"text": [value] * 100}), tmp_path / "repeated.parquet", compression="zstd")
    for name in ("page", "repeated"):
        understate(tmp_path / f"{name}.parquet", tmp_path / f"{name}-understated.parquet")
    nulls = pa.ListArray.from_arrays([0, 25_000_000], pa.nulls(25_000_000, pa.int8()))
    parquet.write_table(pa.table({"texts": nulls}), tmp_path / "nulls.parquet", compression="zstd")
    command = [sys.executable, "-c", PROGRAM, f"{tmp_path}/*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said = {name: rest for name, *rest in (line.split("\t") for line in done.stdout.splitlines())}
    assert len(said) == 12 and max(int(grown) for grown, _, _ in said.values()) < 150, said
    assert 0 < max(int(beside) for _, beside, _ in said.values()) < 200, said
    for name in ("page-understated", "repeated-understated", "nulls"):
        expected = r"row group 0 with its \d+ rows .* says to be \d+ bytes, and takes more than 192 MiB to decode"
        assert re.search(expected, said[name][2]), said
