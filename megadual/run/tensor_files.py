"""The tensors of a checkpoint in torch.distributed.checkpoint's files, read without running what a file says.

Their index, `.metadata`, is a pickle, which can call anything that it names: here only the types that an index is made
of. What the other files say of their tensors is read by `torch.load(weights_only=True)`. Objects beside the tensors are
not read at all, since torch's own planner unpickles them as they are.
"""

import math
import pickle
from pathlib import Path, PurePath
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megadual.errors import UserError, first_line
from megadual.run.checkpoints import PASSING

INDEX = ".metadata"
TYPES = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        dcp.BytesStorageMetadata,
        dcp.ChunkStorageMetadata,
        dcp.Metadata,
        dcp.MetadataIndex,
        dcp.StorageMeta,
        dcp.TensorProperties,
        dcp.TensorStorageMetadata,
        dcp._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        # megatron-core's writer adds what each rank had planned.
        planner.BytesIOWriteData,
        planner.SavePlan,
        planner.TensorWriteData,
        planner.WriteItem,
        planner.WriteItemType,
        torch.Size,
        torch.serialization._get_layout,  # type: ignore[attr-defined]  # looks a name up in a table
    )
}
# The folder that it was written to, which nothing asks for.
TYPES |= {(module, "PosixPath"): PurePath for module in ("pathlib", "pathlib._local")}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in TYPES:
            return TYPES[module, name]
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index")


class TensorFiles:
    """A checkpoint's tensors, of which any part can be read into one's own. Every rank may read by itself."""

    def __init__(self, checkpoint: Path):
        """UserError where the index can't be read, or is none."""
        self.folder = Path(checkpoint)
        try:
            with open(self.folder / INDEX, "rb") as file:
                index = _IndexUnpickler(file).load()
            self.entries: dict[str, dcp.TensorStorageMetadata] = {
                name: entry
                for name, entry in index.state_dict_metadata.items()
                if isinstance(entry, dcp.TensorStorageMetadata)
            }
            self._places: dict[dcp.MetadataIndex, filesystem._StorageInfo] = index.storage_data
            self._check()
        except Exception as error:  # of unpickling: whatever wrong bytes lead to
            raise UserError(f"checkpoint '{checkpoint}': {INDEX} is not its index: {first_line(error)}") from error

    def _check(self) -> None:
        """Raises where the index is not made as one is, or leads out of the folder."""
        for name, entry in self.entries.items():
            if not isinstance(name, str) or not isinstance(entry.properties.dtype, torch.dtype):
                raise TypeError(f"{name!r} has no dtype")
            sizes = [entry.size, *(size for chunk in entry.chunks for size in (chunk.sizes, chunk.offsets))]
            if not all(isinstance(size, torch.Size) and len(size) == len(entry.size) for size in sizes):
                raise TypeError(f"'{name}' has no size")
        for place in self._places.values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"'{place.relative_path}' is no file of the checkpoint")

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry.size) for name, entry in self.entries.items()}

    @property
    def weights(self) -> list[str]:
        """Names of what is no optimizer's."""
        return [name for name in self.entries if not name.startswith("optimizer.")]

    def read(self, name: str, offset: tuple[int, ...], tensor: Tensor) -> None:
        """Fill `tensor`, of any dtype and device, with the part of the stored one that begins at `offset`.

        UserError where that is not all there, or can't be read.
        """
        part = dcp.ChunkStorageMetadata(torch.Size(offset), tensor.size())
        items = create_read_items_for_chunk_list(name, self.entries[name], [part])
        if sum(math.prod(item.lengths) for item in items) != tensor.numel():
            raise UserError(f"checkpoint '{self.folder}': {INDEX} lacks a part of {name}")
        for item in items:
            file = "the file of"
            try:
                place = self._places[item.storage_index]
                file = place.relative_path
                into = tensor.detach()[_slices(item.dest_offsets, item.lengths)]
                self._read(place, _slices(item.storage_offsets, item.lengths), into)
            except Exception as error:
                if getattr(error, "errno", None) in PASSING:
                    raise
                raise UserError(f"checkpoint '{self.folder}': {file} has no {name}: {first_line(error)}") from error

    def _read(self, place: filesystem._StorageInfo, part: tuple[slice, ...], into: Tensor) -> None:
        """Fill `into` with a part of what `torch.save` wrote to a place in a file.

        Where both lie in one piece it is read to where it belongs: memory that `torch.load` would take for the whole
        tensor has to be found page by page, which takes longer than reading.
        """
        with open(self.folder / place.relative_path, "rb") as file:

            def load(device: str) -> Tensor:
                view = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
                return torch.load(view, device, weights_only=True)

            stored = load("meta")
            wanted, begin = stored[part], getattr(stored.untyped_storage(), "_checkpoint_offset", None)
            if wanted.shape != into.shape:
                raise ValueError(f"{tuple(stored.shape)} is stored")
            alike = wanted.dtype == into.dtype and wanted.is_contiguous() and into.is_contiguous()
            if begin is None or not alike or into.device.type != "cpu":  # older versions of torch don't say where it is
                into.copy_(load("cpu")[part])
                return
            file.seek(place.offset + begin + wanted.storage_offset() * wanted.itemsize)
            left = into.reshape(-1).view(torch.uint8).numpy().data
            while left:
                count = file.readinto(left)
                if not count:
                    raise EOFError("the file ends within it")
                left = left[count:]


def _slices(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))
