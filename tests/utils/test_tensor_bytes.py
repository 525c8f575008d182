"""Bytes that operations allocate, read and write, against counts by hand."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnabla.utils.tensor_bytes import LiveBytes, MovedBytes
from tests.checks import randn


def moved(compute) -> int:
    with MovedBytes() as counter:
        compute()
    return counter.total


def test_matrix_product() -> None:
    x, weight, bias = randn(5, 3), randn(4, 3), randn(4)
    assert moved(lambda: torch.nn.functional.linear(x, weight, bias)) == 4 * (15 + 12 + 4 + 20)


def test_forward_and_backward() -> None:
    """y = exp(x): x is read and y written; backward, the gradient and y are read, and their product written."""
    x = randn(7).requires_grad_()
    ones = torch.ones(7)
    assert moved(lambda: torch.autograd.grad(x.exp(), x, ones)) == 4 * (2 * 7 + 3 * 7)


def test_views_move_nothing_and_in_place_reads_and_writes() -> None:
    x, y = randn(6, 2), randn(6, 2)
    assert moved(lambda: x.t().view(2, 2, 3)[0].detach().expand(5, 2, 3)) == 0
    assert moved(lambda: x.add_(y)) == 4 * 3 * 12
    assert moved(lambda: torch.empty(100)) == 0


def test_of_a_broadcast_what_is_in_memory_counts() -> None:
    row, y = randn(1, 2), randn(6, 2)
    assert moved(lambda: row.expand(6, 2) + y) == 4 * (2 + 12 + 12)


def test_dtypes_and_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(10, dtype=torch.bfloat16)
        assert moved(lambda: x.float()) == 2 * 10 + 4 * 10


def test_live_bytes() -> None:
    old = torch.ones(1000)
    with LiveBytes() as memory:
        view = old.view(10, 100).t()
        assert (memory.live, memory.peak) == (0, 0), f"{tuple(view.shape)} was there before"
        a = old + 1
        b = a[:10] * 2
        assert (memory.live, memory.peak) == (4040, 4040)
        del a
        b.mul_(2)
        assert (memory.live, memory.peak) == (40, 4040)


def test_live_bytes_of_a_backward_pass() -> None:
    with LiveBytes() as memory:
        x = torch.ones(1000, requires_grad=True)
        y = x.exp().exp()  # keeps both results
        assert memory.live == 3 * 4000
        y.sum().backward()
        del y
        assert memory.live == 2 * 4000, "not x and its gradient"
