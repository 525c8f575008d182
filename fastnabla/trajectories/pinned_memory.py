"""Tensors in page-locked host memory, of exactly the size that is asked for.

torch's own (`pin_memory=True`) come from a caching allocator: it rounds up to a power of two, so that 33 GiB lock 64,
and hands memory out again while a kernel that it has not been told of still reads it. Here pages are mapped for the
tensor alone and locked with CUDA's `cudaHostRegister`, and given back once the device has finished.
"""

import math
import mmap
import sys

import torch
from torch import Tensor


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros in page-locked memory of the host, whose kernels run on `device`.

    The memory is freed with the last tensor that shares it, after a wait for all work queued on `device`. It is not
    there in a forked process.

    Raises:
        MemoryError: the host has not that much memory, or may not lock it.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        pages = _Pages(size, device)
    except (OSError, RuntimeError) as error:
        raise MemoryError(f"the host cannot lock {size / 2**30:.2f} GiB of memory ({error})") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class _Pages(mmap.mmap):
    """Locked when made, unlocked when collected; a tensor of them holds a reference."""

    address: int | None = None
    """Where they are locked."""
    device: torch.device

    def __new__(cls, size: int, device: torch.device) -> "_Pages":
        pages = super().__new__(cls, -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.device = device
        pages.madvise(mmap.MADV_DONTFORK)  # else a write after a fork moves them away from under the device
        address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(device):
            error = torch.cuda.cudart().cudaHostRegister(address, size, 0)
        if int(error):
            raise RuntimeError(f"cudaHostRegister gives error {int(error)}")
        pages.address = address
        return pages

    def __del__(self) -> None:
        if self.address is not None and not sys.is_finalizing():  # then the driver does it
            torch.cuda.synchronize(self.device)
            torch.cuda.cudart().cudaHostUnregister(self.address)
