"""The buffer's compiled operations against `buffer_torch`, bit by bit. Their errors: test_extension.py."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastnabla.trajectories import buffer_ops, buffer_torch
from tests.checks import randn

COMPILED = pytest.mark.skipif(not buffer_ops.AVAILABLE, reason="the extension is not built")
WITH_CUDA = pytest.mark.skipif(not buffer_ops.CUDA_AVAILABLE, reason="the extension is not built for CUDA")
CPU = pytest.param("cpu", marks=COMPILED)
GPU = [pytest.param(name, marks=[pytest.mark.gpu, WITH_CUDA]) for name in ("cuda", "pinned")]
on_each_device = pytest.mark.parametrize("device", [CPU, *GPU])
"""Where the data is. "pinned": slabs in page-locked host memory, the rest on the GPU."""

SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 65519.9, 65520.0, -1e-8, 2**-24, 2**-25, 6e-5, 1e-40, 3.4e38)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
ROWS = ((1,), (3,), (17,), (2, 3, 5), (8, 8), (257,), (4, 16, 16), (4500,), ())


def same(actual: Tensor, expected: Tensor) -> bool:
    """The same dtype, shape and bits; but a NaN for a NaN, of which each device has its own when it converts."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # which `.cpu()` of a tensor in pinned memory does not
    actual = actual.cpu()
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if not actual.is_floating_point():
        return torch.equal(actual, expected)
    there = ~expected.isnan()
    integer = INTEGERS[actual.itemsize]
    bits, expected_bits = actual[there].view(integer), expected[there].view(integer)
    return torch.equal(~actual.isnan(), there) and torch.equal(bits, expected_bits)


def values(*shape: int, seed: int) -> Tensor:
    """Normal numbers of every size, and in a fifth of all runs of 64 some special ones."""
    source = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    runs = -(-count // 64)
    x = torch.randn(runs, 64, generator=source) * 10 ** torch.randint(-6, 4, (runs, 1), generator=source)
    special = (torch.rand(runs, 1, generator=source) < 0.2) & (torch.rand(runs, 64, generator=source) < 0.1)
    chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (runs, 64), generator=source)]
    return torch.where(special, chosen, x).flatten()[:count].view(shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """A buffer and what goes into it and out of it."""

    slots: int = 3
    num_steps: int = 4
    kept: int = 2
    row: tuple[int, ...] = (3, 17)
    stored: torch.dtype = torch.float32
    given: torch.dtype = torch.float32
    taken: torch.dtype = torch.float32
    block: int | None = None
    gap: int = 5
    """Elements in front of each row of a slab, so that rows need not be aligned, and an unused position."""
    offset: int = 3
    """Elements in front of the rows that are given."""
    seed: int = 0

    def build(self, device: str) -> SimpleNamespace:
        """The operations' arguments, the same in each call; `whole` are the slabs with what is around them."""
        source = torch.Generator().manual_seed(self.seed)
        on = "cuda" if device == "pinned" else device
        whole, views = [], []

        def slab(positions: int, row: tuple[int, ...], dtype: torch.dtype) -> None:
            size, sentinel = math.prod(row), -77 if dtype == torch.int8 else math.nan
            tensor = torch.full((self.slots, positions + 1, self.gap + size), sentinel, dtype=dtype)
            tensor = tensor.pin_memory() if device == "pinned" else tensor.to(on)
            whole.append(tensor)
            views.append(tensor[:, 1:, self.gap :].unflatten(2, row) if row else tensor[:, 1:, self.gap])

        def at(kept: Tensor) -> Tensor:
            """Positions, a different order in each slot; −1 where nothing is kept."""
            rank = torch.rand(kept.shape, generator=source).masked_fill(~kept, 2).argsort(1).argsort(1)
            return torch.where(kept, rank, -1).int().to(on)

        slots, num_steps = self.slots, self.num_steps
        steps = torch.randint(num_steps, (slots, self.kept), generator=source)
        outputs = torch.zeros(slots, num_steps, dtype=torch.bool).scatter_(1, steps, True)
        states = torch.zeros(slots, num_steps + 1, dtype=torch.bool).scatter_(1, steps, True)
        states.scatter_(1, steps + 1, True)
        slab(min(2 * self.kept, num_steps + 1), self.row, self.stored)
        slab(self.kept, self.row, torch.int8 if self.block else self.stored)
        if self.block:
            slab(self.kept, (-(-math.prod(self.row) // self.block),), torch.float32)
        by_slot = torch.arange(slots)
        numbers = steps, by_slot * 7 + 2**40, by_slot / 3
        return SimpleNamespace(
            whole=whole,
            slabs=(*views, *([] if self.block else [None]), at(states), at(outputs)),
            numbers=tuple(tensor.to(on) for tensor in numbers),
        )

    def rows(self, *shape: int, seed: int, device: str) -> Tensor:
        x = values(*shape, *self.row, seed=100 * self.seed + seed).to(
            "cuda" if device == "pinned" else device, self.given
        )
        return torch.cat([x.new_zeros(self.offset), x.flatten()])[self.offset :].view_as(x)

    def some_slots(self) -> Tensor:
        return torch.randperm(self.slots, generator=torch.Generator().manual_seed(self.seed))[: self.seed % 5]

    def append(self, operations, built: SimpleNamespace, device: str, step: int = 0) -> None:
        slots = self.some_slots()
        x, output, x_next = (self.rows(len(slots), seed=i, device=device) for i in range(3))
        operations.append(*built.slabs, slots.to(x.device), step, x, output, x_next)

    def append_all(self, operations, built: SimpleNamespace, device: str, slots: Tensor | None = None) -> None:
        """All steps."""
        slots = self.some_slots() if slots is None else slots
        states = [self.rows(len(slots), seed=2 * i + 3, device=device) for i in range(self.num_steps + 1)]
        for step, (x, x_next) in enumerate(itertools.pairwise(states)):
            output = self.rows(len(slots), seed=2 * step + 4, device=device)
            operations.append(*built.slabs, slots.to(x.device), step, x, output, x_next)

    def gather(
        self, operations, built: SimpleNamespace, device: str, index: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if index is None:  # with repetitions; empty for some seeds
            source = torch.Generator().manual_seed(self.seed)
            index = torch.randint(self.slots * self.kept, (self.seed % 4 * 5,), generator=source)
        index = index.to("cuda" if device == "pinned" else device)
        return operations.gather(*built.slabs, *built.numbers, index, self.taken)


dtypes = st.sampled_from(DTYPES)
cases = st.builds(
    Case,
    slots=st.integers(1, 6),
    num_steps=st.integers(1, 6),
    kept=st.integers(1, 4),
    row=st.sampled_from(ROWS) | st.tuples(st.integers(1, 700)),
    stored=dtypes,
    given=dtypes,
    taken=dtypes,
    block=st.sampled_from([None, 64, 128, 256]),
    gap=st.integers(0, 9),
    offset=st.integers(0, 9),
    seed=st.integers(0, 2**20),
).filter(lambda case: case.row or not case.block)
FEW = settings(max_examples=80)


def assert_same_everywhere(actual: SimpleNamespace, expected: SimpleNamespace) -> None:
    """Slabs and what is between their rows."""
    for tensor, other in zip(actual.whole, expected.whole, strict=True):
        assert same(tensor, other)


@on_each_device
@FEW
@given(case=cases, step=st.integers(0, 5))
def test_append(device, case, step):
    compiled, plain = case.build(device), case.build("cpu")
    case.append(buffer_ops, compiled, device, step % case.num_steps)
    case.append(buffer_torch, plain, "cpu", step % case.num_steps)
    assert_same_everywhere(compiled, plain)


@pytest.mark.slow
@on_each_device
@FEW
@given(case=cases)
def test_gather(device, case):
    """Also of slots that were not written, which are NaN, or −77 with a scale of NaN."""
    compiled, plain = case.build(device), case.build("cpu")
    for operations, built, where in ((buffer_ops, compiled, device), (buffer_torch, plain, "cpu")):
        case.append_all(operations, built, where)
    actual = case.gather(buffer_ops, compiled, device)
    expected = case.gather(buffer_torch, plain, "cpu")
    assert len(actual) == len(expected) == 7
    for tensor, other in zip(actual, expected, strict=True):
        assert same(tensor, other)
    assert_same_everywhere(compiled, plain)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_value_of_16_bits(device, dtype):
    """To float32 all of them; back from float32 they and all midpoints, neighbours of those, and random bits."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = every.float()
    middle = (exact[:-1].double() + exact[1:].double()).div(2).float()
    there = middle[middle.isfinite()]
    near = [there.nextafter(torch.full_like(there, end)) for end in (-math.inf, math.inf)]
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0)).int()
    for x, target in ((every, torch.float32), (torch.cat([exact, there, *near, bits.view(torch.float32)]), dtype)):
        case = Case(slots=1, num_steps=1, kept=1, row=tuple(x.shape), stored=target)
        built, zero = case.build(device), torch.zeros(1, dtype=torch.int64)
        x = x[None].to(built.slabs[3].device)
        buffer_ops.append(*built.slabs, zero.to(x.device), 0, x, x, x)
        assert same(built.slabs[1][0, 0], x[0].cpu().to(target))


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_keep_the_bits_of_a_nan(device, dtype):
    integer = INTEGERS[dtype.itemsize]
    top = torch.tensor(math.inf, dtype=dtype).view(integer)
    bits = torch.cat([top + torch.arange(1, 60, dtype=integer), torch.arange(-60, 0, dtype=integer)])
    case = Case(slots=1, num_steps=1, kept=1, row=(119,), stored=dtype, taken=dtype)
    built = case.build(device)
    x, index = bits.view(dtype)[None].to(built.slabs[3].device), torch.zeros(1, dtype=torch.int64)
    assert x.isnan().all()
    buffer_ops.append(*built.slabs, index.to(x.device), 0, x, x, x)
    for field in case.gather(buffer_ops, built, device, index)[:3]:
        assert torch.equal(field.view(integer)[0].cpu(), bits)


@pytest.mark.parametrize("operations", [pytest.param(buffer_ops, marks=COMPILED), buffer_torch])
@pytest.mark.parametrize("block", [64, 128, 256])
def test_quantisation_error(operations, block):
    """At most half a scale, and 2⁻²² of the block's largest for float32: a quotient of up to 127 has an error of 2⁻¹⁸,
    half a spacing, and so has their product. Most elements are put where it matters, beside the middle of two values.
    """
    largest = 10.0 ** torch.linspace(-30, 30, 61)
    x = torch.cat([randn(61, block - 1) * 0.2, torch.ones(61, 1)], 1).clamp(-1, 1)
    x[:, : block // 2] = (torch.arange(block // 2) - block // 4 + 0.5) / 127
    x[:, : block // 4] = x[:, : block // 4].nextafter(torch.tensor(2.0))
    x = x.clamp(-1, 1) * largest[:, None]
    case, slots = Case(slots=61, num_steps=1, kept=1, row=(block,), block=block), torch.arange(61)
    built = case.build("cpu")
    operations.append(*built.slabs, slots, 0, x, x, x)
    q, scales = (slab[:, 0] for slab in built.slabs[1:3])
    error = (x.double() - case.gather(operations, built, "cpu", slots)[2]).abs()
    absmax = x.abs().amax(1, True).double()
    assert torch.equal(scales, (absmax.float() / 127))
    assert (error <= scales.double() / 2 + 2**-22 * absmax).all()
    assert (error > scales.double() * 0.49).any(), "the inputs do not try the bound"
    assert q.abs().amax() == 127


def test_threads_change_nothing():
    """Rows enough for several threads each."""
    case, threads = Case(slots=40, num_steps=9, kept=3, row=(4, 33, 33), block=64), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            built = case.build("cpu")
            case.append_all(buffer_ops, built, "cpu", torch.arange(40).flip(0))
            results.append((*built.whole, *case.gather(buffer_ops, built, "cpu", torch.arange(120))))
    finally:
        torch.set_num_threads(threads)
    assert all(same(a, b) for a, b in zip(*results, strict=True))
