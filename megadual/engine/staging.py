"""Host memory that tensors lie in on their way between a GPU and a checkpoint's files.

Made once and used for every checkpoint. Memory that was never written to has to be found by the kernel page by page,
and a GPU copies to memory that may move no faster than a core does: both together would hold training up for longer
than all else.
"""

import functools
import math
import mmap
import threading
import warnings
from collections.abc import Callable

import torch

ALIGNED = 64  # bytes


class Staging:
    """A piece of host memory of a fixed size, which tensors are cut from in turn.

    It is made in the background; what asks for a tensor first waits for it.
    """

    def __init__(self, size: int):
        """`size` in bytes, as `size_of` counts them."""
        self._size, self._used = max(size, ALIGNED), 0
        self._error: BaseException | None = None
        self._registered = False
        self._making = threading.Thread(target=self._make, args=(same_device(),), name="staging", daemon=True)
        self._making.start()

    def _make(self, set_device: Callable[[], None]) -> None:
        try:
            set_device()
            self._memory = mmap.mmap(-1, self._size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            self._whole = torch.frombuffer(self._memory, dtype=torch.uint8)
            self._whole.zero_()
            if torch.cuda.is_available():
                code = int(torch.cuda.cudart().cudaHostRegister(self._whole.data_ptr(), self._size, 0))
                self._registered = code == 0
                if code:
                    told = f"memory for checkpoints is not pinned (CUDA's error {code}), so saving takes longer"
                    warnings.warn(told, stacklevel=1)
        except BaseException as error:
            self._error = error

    def reset(self) -> None:
        """Begin anew: tensors that were cut from it will be overwritten."""
        self._making.join()
        if self._error:
            raise self._error
        self._used = 0

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the next piece, with a storage of its own, as `torch.save` writes a storage whole."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        begin, self._used = self._used, self._used + size_of(shape, dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin).view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor, which is there once its device has been synchronised."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

    def close(self) -> None:
        """Give the memory back; tensors that were cut from it keep it, but slow to copy to."""
        self._making.join()
        if self._registered:
            self._registered = False
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._whole.data_ptr()))


def size_of(shape: torch.Size, dtype: torch.dtype) -> int:
    """Bytes of a Staging that a tensor takes."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED


def same_device() -> Callable[[], None]:
    """Called in another thread, which begins with the first GPU, gives it that of this one."""
    if not torch.cuda.is_available():
        return lambda: None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())
