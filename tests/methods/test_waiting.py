"""Nothing in the training step waits for the device."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastnabla.trajectories.transitions import Transitions
from tests.methods.test_sharing import batch as adjacent
from tests.small_step import shared_step, small_step

WAITING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten._unique2,
    torch.ops.aten.unique_dim,
    torch.ops.aten.masked_select,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.bincount,
}
"""Operations whose result's shape, or use by the host, depends on values on the device."""


class NoWaiting(TorchDispatchMode):
    """Fails where the host reads a float tensor, or indexes one by a mask.

    On a CPU everything is on the host. The step's own planning touches integers alone, the selection's host columns, so
    floats stand for what would be on the GPU.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = function.overloadpacket
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and first.is_floating_point():
            assert kind not in WAITING, f"{kind} of a float tensor"
            by_mask = kind is torch.ops.aten.index and any(i is not None and i.dtype == torch.bool for i in args[1])
            assert not by_mask, "floats indexed by a mask"
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("reward_gradient", ["lookahead", "lookahead_detached", "terminal"])
@pytest.mark.parametrize("reuse_passes", [False, True])
def test_no_float_decides_on_the_host(reward_gradient, reuse_passes):
    golden = shared_step()
    step = golden.step(4, "torch", reuse_passes=reuse_passes, reward_gradient=reward_gradient)
    with NoWaiting():
        step(adjacent(golden))


def test_the_mode_sees_waiting():
    with NoWaiting(), pytest.raises(AssertionError):
        torch.randn(3).sum().item()
    x = torch.randn(3)
    with NoWaiting(), pytest.raises(AssertionError):
        x[x > 0]


@pytest.mark.gpu
@pytest.mark.parametrize("reward_gradient", ["lookahead", "lookahead_detached", "terminal"])
@pytest.mark.parametrize("reuse_passes", [False, True])
def test_nothing_waits_on_a_gpu(reward_gradient, reuse_passes):
    golden = small_step().to("cuda")
    host = adjacent(shared_step())
    columns = (field.name for field in dataclasses.fields(host))
    on_gpu = Transitions(**{name: getattr(host, name).cuda() for name in columns})
    selection = dataclasses.replace(host.select(), gather=lambda rows: on_gpu[rows.to("cuda", non_blocking=True)])
    step = golden.step(4, reuse_passes=reuse_passes, reward_gradient=reward_gradient)
    step(selection)  # kernels are compiled, and libraries started
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(selection)
    finally:
        torch.cuda.set_sync_debug_mode("default")
