"""Tensors in page-locked host memory of exactly the requested size.

torch's own (`pin_memory=True`) come from a caching allocator. It rounds up to a power of two, so 33 GiB lock 64 GiB,
and it reuses memory that a kernel may still be reading if torch did not launch that kernel. Here pages are mapped for one
tensor, locked with CUDA's `cudaHostRegister`, and freed once the device has finished.
"""

import math
import mmap
import sys

import torch
from torch import Tensor


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros in page-locked host memory, for kernels on `device`.

    The memory is freed with the last tensor that shares it, after a wait for all work queued on `device`. A forked process
    does not inherit it.

    Raises:
        MemoryError: the host does not have that much memory, or may not lock it.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        pages = _Pages(size, device)
    except (OSError, RuntimeError) as error:
        raise MemoryError(f"the host cannot lock {size / 2**30:.2f} GiB of memory ({error})") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class _Pages(mmap.mmap):
    """Pages that are locked when created and unlocked when collected. A tensor of them holds a reference."""

    address: int | None = None
    """Where they are locked."""
    device: torch.device

    def __new__(cls, size: int, device: torch.device) -> "_Pages":
        pages = super().__new__(cls, -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.device = device
        # After a fork, the first write would otherwise move the pages away from under the device.
        pages.madvise(mmap.MADV_DONTFORK)
        address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(device):
            error = torch.cuda.cudart().cudaHostRegister(address, size, 0)
        if int(error):
            raise RuntimeError(f"cudaHostRegister gives error {int(error)}")
        pages.address = address
        return pages

    def __del__(self) -> None:
        if self.address is not None and not sys.is_finalizing():  # at exit the driver unlocks them
            torch.cuda.synchronize(self.device)
            torch.cuda.cudart().cudaHostUnregister(self.address)
