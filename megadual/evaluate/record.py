"""What scores and pictures were made of: the model, the software, the files."""

import datetime
import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path

from megadual.errors import UserError
from megadual.run.record import git_revision

PACKAGES = ("megadual", "torch", "transformers", "pillow", "numpy")


def file_sha256(path: Path) -> str:
    """Of a file, or of all files of a folder with their names."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    both = [f"{file.relative_to(path)} {file_sha256(file)}" for file in sorted(path.rglob("*")) if file.is_file()]
    return hashlib.sha256("\n".join(both).encode()).hexdigest()


def model_record(folder: Path) -> dict:
    """Which exported model: its folder, the hash of its weights and config, and their dtype."""
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"'{folder}' is not an exported model; give the --output of checkpoints_tools/convert_to_hf.py")
    parts = [config, *sorted(folder.glob("*.safetensors"))]
    digest = hashlib.sha256("\n".join(map(file_sha256, parts)).encode()).hexdigest()
    return {"path": str(folder), "sha256": digest, "dtype": json.loads(config.read_text()).get("dtype")}


def software() -> dict:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), **versions, "git": git_revision()}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_json(path: Path, value) -> None:
    """The file appears only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, path)
