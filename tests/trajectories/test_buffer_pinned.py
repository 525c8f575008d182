"""Page-locked memory: exactly the bytes asked for, locked while there is a tensor of it, and a wait before it is freed.

CUDA is a double here: what is tested is which of its functions are called, with what, and when.
"""

import contextlib
import gc

import pytest
import torch

from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.pinned_memory import pinned
from tests.checks import append_all

GPU = torch.device("cuda", 0)
PAGE = 4096


class Runtime:
    """CUDA's runtime: ranges that are locked now, and what was called."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.locked, self.calls = error, {}, []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append("lock")
        if not self.error:
            self.locked[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append("unlock")
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: runtime.calls.append(f"wait for {device}"))
    yield runtime
    gc.collect()
    assert not runtime.locked, "memory was given back to the host while it was locked"


def test_exactly_the_bytes_asked_for(runtime):
    """Of 33 MiB torch's own allocator would lock 64."""
    x = pinned((33, 2**19), torch.bfloat16, GPU)
    assert x.shape == (33, 2**19)
    assert x.dtype == torch.bfloat16
    assert runtime.locked == {x.data_ptr(): 33 * 2**20}
    assert x.untyped_storage().nbytes() == 33 * 2**20
    assert x.data_ptr() % PAGE == 0, "a page that is shared with others is locked with theirs"
    assert not x.any()


def test_memory_is_freed_with_the_last_tensor_after_a_wait(runtime):
    x = pinned((3, 5), torch.float32, GPU)
    view = x[1:].fill_(2)
    del x
    gc.collect()
    assert runtime.calls == ["lock"]
    assert view.sum() == 20
    del view
    gc.collect()
    assert runtime.calls == ["lock", "wait for cuda:0", "unlock"]


def test_memory_that_cannot_be_locked(runtime):
    runtime.error = 2
    with pytest.raises(
        MemoryError, match=r"the host cannot lock 0\.50 GiB of memory \(cudaHostRegister gives error 2\)"
    ):
        pinned((2**27,), torch.float32, GPU)
    gc.collect()
    assert runtime.calls == ["lock"]
    with pytest.raises(MemoryError, match=r"the host cannot lock \d+\.00 GiB of memory \(.*Cannot allocate"):
        pinned((2**56,), torch.float32, GPU)


def test_a_buffers_slabs(runtime):
    """Locked as planned, and only freed after a wait for the kernels that read them."""
    buffer = TrajectoryBuffer.__new__(TrajectoryBuffer)
    buffer.storage, buffer.device = "pinned", GPU
    slab = buffer._slab((3, 1000), torch.float32)
    assert runtime.locked == {slab.data_ptr(): slab.nbytes}
    runtime.error = 1
    with pytest.raises(MemoryError, match=r"storage = 'pinned': the host cannot lock .* output_block, or use storage="):
        buffer._slab((3, 1000), torch.float32)


@pytest.mark.gpu
def test_on_a_gpu():
    """torch takes it for pinned, kernels are waited for, and memory that is not locked is refused."""
    x = pinned((33, 2**19), torch.float32, torch.device("cuda"))
    assert x.is_pinned()
    x.fill_(3)
    assert torch.equal(x.cuda(non_blocking=True).cpu(), x)
    buffer = TrajectoryBuffer(2, 2, 2, (2**20,), device="cuda", storage="pinned")
    slots = buffer.reserve(torch.tensor([[0, 1]] * 2), torch.arange(2))
    states = torch.randn(2, 3, 2**20, device="cuda")
    append_all(buffer, slots, states, states[:, 1:])
    batches = [buffer.gather(buffer.transitions()) for _ in range(20)]
    del buffer  # with kernels in flight
    other = pinned((2, 3, 2**20), torch.float32, torch.device("cuda")).fill_(9)
    for batch in batches:
        assert torch.equal(batch.x, states[:, :2].flatten(0, 1))
    assert (other == 9).all()
