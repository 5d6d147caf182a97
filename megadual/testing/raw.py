"""Small raw inputs of every kind that the pipeline reads, for tests."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from megadual.synthetic.files import png_bytes, write_tar


def plain_image(i: int, size: tuple[int, int] = (32, 32)) -> bytes:
    """A PNG of one colour, another for every i."""
    return png_bytes(Image.new("RGB", size, (37 * i % 256, 101 * i % 256, 59 * i % 256)))


def write_img2dataset_parquet(path: Path, rows: int, not_downloaded: tuple[int, ...] = ()) -> None:
    """Rows as img2dataset's parquet output has them: keys, captions, JPEGs, and rows of what it could not fetch."""
    table = {"key": [], "url": [], "caption": [], "status": [], "error_message": [], "jpg": []}
    for i in range(rows):
        failed = i in not_downloaded
        jpeg = io.BytesIO()
        Image.open(io.BytesIO(plain_image(i))).save(jpeg, "JPEG")
        values = (f"{i:09d}", f"https://example.org/{i}.jpg", f"plain picture {i}",
                  "failed_to_download" if failed else "success", "HTTP Error 404" if failed else None,
                  None if failed else jpeg.getvalue())  # fmt: skip
        for column, value in zip(table, values, strict=True):
            table[column].append(value)
    parquet.write_table(pa.table({**table, "jpg": pa.array(table["jpg"], pa.binary())}), path, row_group_size=100)


def write_pages_tar(path: Path, pages: list[list[str | bytes]]) -> None:
    """Interleaved documents as webdataset samples: texts and images in the order of each page's parts."""
    members = []
    for number, page in enumerate(pages):
        names = [None if isinstance(part, str) else f"{place}.png" for place, part in enumerate(page)]
        lists = {"texts": [part if isinstance(part, str) else None for part in page], "images": names}
        members.append((f"page-{number:04d}.json", json.dumps(lists).encode()))
        members += [(f"page-{number:04d}.{name}", part) for name, part in zip(names, page, strict=True) if name]
    write_tar(path, members)


def write_pages_parquet(path: Path, pages: list[list[str | bytes]]) -> None:
    """The same documents as rows of two lists."""
    texts = [[part if isinstance(part, str) else None for part in page] for page in pages]
    images = [[part if isinstance(part, bytes) else None for part in page] for page in pages]
    table = {"texts": pa.array(texts, pa.list_(pa.string())), "images": pa.array(images, pa.list_(pa.binary()))}
    parquet.write_table(pa.table(table), path)


def write_json_lines(path: Path, texts: list[str]) -> None:
    """One {"text": ...} a line, gzipped where the name ends in .gz."""
    write_entries(path, [{"text": text} for text in texts])


def write_entries(path: Path, entries: list[dict]) -> None:
    """As .json, one array over many lines; as .jsonl, one a line; gzipped where the name ends in .gz."""
    if ".jsonl" in path.name:
        data = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    else:
        data = json.dumps(entries, indent=2, ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # datasets' Image feature


def image_structs(values: list) -> pa.Array:
    """A column of images, or of lists of images, as datasets writes it."""
    struct = lambda data: None if data is None else {"bytes": data, "path": "a.png"}
    if any(isinstance(value, list) for value in values):
        return pa.array([[struct(data) for data in value] for value in values], pa.list_(IMAGE_STRUCT))
    return pa.array([struct(value) for value in values], IMAGE_STRUCT)


def write_parquet(path: Path, **columns) -> None:
    parquet.write_table(pa.table(columns), path)


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
