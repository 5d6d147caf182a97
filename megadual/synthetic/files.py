"""Files whose bytes depend on what they hold alone."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

Members = list[tuple[str, bytes]]


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def json_bytes(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def write_tar(path: Path, members: Members) -> None:
    """A tar of files: (name, contents) in order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)  # mtime, uid and gid are 0
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_image_table(path: Path, rows: list[dict[str, str | bytes]]) -> None:
    """Parquet as Hugging Face's datasets keep it: bytes are encoded images, each a struct of bytes and path."""
    images = {name for name, value in rows[0].items() if isinstance(value, bytes)}
    fields, features = [], {}
    for name in rows[0]:
        stored = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if name in images else pa.string()
        fields.append(pa.field(name, stored))
        features[name] = {"_type": "Image"} if name in images else {"dtype": "string", "_type": "Value"}
    schema = pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})
    stored_rows = [
        {name: {"bytes": value, "path": None} if name in images else value for name, value in row.items()}
        for row in rows
    ]
    parquet.write_table(pa.Table.from_pylist(stored_rows, schema), path, row_group_size=100)
