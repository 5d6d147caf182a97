"""The tensors of a checkpoint in torch.distributed.checkpoint's files, read without running what a file says.

Their index, `.metadata`, is a pickle, which can call anything that it names: here only the types that an index is made
of. The other files are read by `torch.load(weights_only=True)`. Objects beside the tensors are not read at all, since
torch's own planner unpickles them as they are.
"""

import math
import pickle
from pathlib import Path, PurePath

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, filesystem, planner
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

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


class TensorFiles(FileSystemReader):
    """A checkpoint's tensors, of which any part can be read into one's own. Every rank may read by itself."""

    def __init__(self, checkpoint: Path):
        """UserError where the index can't be read, or is none."""
        super().__init__(str(checkpoint))
        self.folder = Path(checkpoint)
        try:
            with open(self.folder / INDEX, "rb") as file:
                index = _IndexUnpickler(file).load()
            self.entries: dict[str, dcp.TensorStorageMetadata] = {
                name: entry
                for name, entry in index.state_dict_metadata.items()
                if isinstance(entry, dcp.TensorStorageMetadata)
            }
            self.storage_data = index.storage_data
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
        for place in self.storage_data.values():
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
                file = self.storage_data[item.storage_index].relative_path
                self.read_data(LoadPlan([item]), _Into(tensor))
            except Exception as error:
                if getattr(error, "errno", None) in PASSING:
                    raise
                raise UserError(f"checkpoint '{self.folder}': {file} has no {name}: {first_line(error)}") from error


class _Into(DefaultLoadPlanner):
    """Says where what is read goes to: a part of one tensor."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.tensor = tensor.detach()

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        parts = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.tensor[tuple(slice(start, start + length) for start, length in parts)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def load_bytes(self, read_item: ReadItem, value) -> None:
        raise TypeError("it is no tensor")  # torch's would unpickle it
