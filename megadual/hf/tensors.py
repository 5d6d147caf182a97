"""A model's tensors one at a time, so that a conversion holds one of them and never the model.

What is read has `meta`: every name with a tensor of the meta device, whose shape and dtype are known before any data
is read; and `read(name)`.
"""

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megadual.errors import UserError

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
        self._reader = _Reader(checkpoint)
        self.meta = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }

    def read(self, name: str) -> Tensor:
        tensor = torch.empty_like(self.meta[name], device="cpu")
        with warnings.catch_warnings(action="ignore"):  # that there is no process group
            dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor


class _Reader(dcp.FileSystemReader):
    """Reads the checkpoint's index once, not for every tensor."""

    def __init__(self, checkpoint: Path):
        super().__init__(str(checkpoint))
        self._metadata = super().read_metadata()

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self._metadata


class FolderTensors:
    """The tensors of a Hugging Face folder's safetensors files; UserError where it has none, or not all."""

    def __init__(self, folder: Path):
        self.folder, self._files = folder, {}
        index = folder / INDEX
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {WEIGHTS}
        self.meta: dict[str, Tensor] = {}
        for file in sorted(names):
            if not (folder / file).is_file():
                raise UserError(f"'{folder}' holds no {file}; weights are read from *.safetensors only")
            with safe_open(folder / file, framework="pt") as tensors:
                for name in tensors.keys():
                    part = tensors.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise UserError(f"'{folder / file}': '{name}' is {part.get_dtype()}; use the unquantised model")
                    self.meta[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
                    self._files[name] = folder / file

    def read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as tensors:  # opened anew, so that its pages are let go
            return tensors.get_tensor(name)


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
