"""A model's tensors one at a time, so that a conversion holds one of them and never the model.

What is read has `meta`: every name with a tensor of the meta device, whose shape and dtype are known before any data
is read; and `read(name)`.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megadual.errors import UserError
from megadual.run.tensor_files import TensorFiles

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# safetensors' names of dtypes
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointTensors:
    """The full, unsharded weights of a pretraining checkpoint of any layout, by their global names."""

    def __init__(self, checkpoint: Path):
        self._files = TensorFiles(checkpoint)
        entries = {name: self._files.entries[name] for name in self._files.weights}
        self.meta = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in entries.items()
        }
        self.folder = checkpoint

    def read(self, name: str) -> Tensor:
        tensor = torch.empty_like(self.meta[name], device="cpu")
        self._files.read(name, (0,) * tensor.dim(), tensor)
        return tensor


class FolderTensors:
    """The tensors of a Hugging Face folder's safetensors files; UserError where it has none, or not all."""

    def __init__(self, folder: Path):
        self.folder, self._files = folder, {}
        index = self._index()
        self.meta: dict[str, Tensor] = {}
        for file in sorted({*index.values()} if index else {WEIGHTS}):
            if not (folder / file).is_file():
                raise UserError(f"'{folder}' holds no {file}; weights are read from *.safetensors only")
            for name, part in self._parts(folder / file):
                if part.get_dtype() not in DTYPES:
                    raise UserError(f"'{folder / file}': '{name}' is {part.get_dtype()}; use the unquantised model")
                self.meta[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
                self._files[name] = folder / file
        if index and (wrong := [name for name in index.keys() | self.meta.keys() if index.get(name) != self._at(name)]):
            raise UserError(f"'{folder / INDEX}' does not say where {min(wrong)} is; copy or make the folder anew")

    def _index(self) -> dict[str, str] | None:
        """The file that each tensor is in, where there are several."""
        path = self.folder / INDEX
        if not path.is_file():
            return None
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not all(Path(str(file)).name == file for file in index.values()):
            raise UserError(f"'{path}' has no weight_map of the files beside it")
        return index

    def _at(self, name: str) -> str | None:
        return self._files[name].name if name in self._files else None

    def _parts(self, path: Path) -> Iterator[tuple[str, Any]]:
        """The file's tensors, not read yet."""
        try:
            with safe_open(path, framework="pt") as tensors:
                yield from ((name, tensors.get_slice(name)) for name in tensors.keys())
        except SafetensorError as error:
            raise UserError(f"'{path}' is damaged: {error}") from error

    def read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as tensors:  # opened anew, so that its pages are let go
            return tensors.get_tensor(name)


def read_json(path: Path) -> dict:
    """What a JSON file holds; UserError where it is missing, or holds no object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is not JSON: {error}"
        raise UserError(f"'{path}' {reason}") from error
    if not isinstance(found, dict):
        raise UserError(f"'{path}' holds no JSON object")
    return found


def misfits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """In words how tensors differ by name and shape from those that are expected; "" where they don't."""
    faults = [
        f"'{name}' is {tuple(found[name].shape) if name in found else 'missing'}, expected "
        f"{tuple(expected[name].shape) if name in expected else 'no such tensor'}"
        for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or found[name].shape != expected[name].shape
    ]
    return "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")


def write_folder(
    folder: Path, meta: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]], max_shard_size: str | int = "5GB"
) -> None:
    """Write safetensors files of at most `max_shard_size` bytes, and their index if there are several.

    `meta` says what `tensors` will give, in any order. The safetensors library writes whole files only.
    """
    split = split_state_dict_into_shards_factory(
        meta,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    places: dict[str, tuple[Path, int]] = {}
    for file, names in split.filename_to_tensors.items():
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(names, key=lambda name: -meta[name].element_size()):  # so that all are aligned
            begin, end = end, end + meta[name].nbytes
            shape = list(meta[name].shape)
            header[name] = {"dtype": NAMES[meta[name].dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        places |= {name: (folder / file, 8 + len(text) + header[name]["data_offsets"][0]) for name in names}
    for name, tensor in tensors:
        assert (tensor.shape, tensor.dtype) == (meta[name].shape, meta[name].dtype), name
        path, offset = places.pop(name)
        with open(path, "r+b") as written:
            written.seek(offset)
            written.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    assert not places, f"nothing was written for {list(places)[:4]}"
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_checkpoint(folder: Path, meta: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write torch.distributed.checkpoint's files, one for each tensor of `meta`, which `read(name)` makes in turn."""
    writer = dcp.FileSystemWriter(str(folder), single_file_per_rank=False)
    with warnings.catch_warnings(action="ignore"):  # that there is no process group
        dcp.save(meta, storage_writer=writer, planner=_LatePlanner(read), no_dist=True)


class _LatePlanner(dcp.DefaultSavePlanner):
    """Plans with tensors of the meta device; their values are made when they are written."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self._read = read

    def resolve_data(self, write_item) -> Tensor:
        return self._read(write_item.index.fqn)
