"""The log-density of a step by Triton's kernels, against plain torch in float64."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.published import ddim_table
from fastnabla.objective.fused import FUSED
from fastnabla.objective.ops import PLAIN, ObjectiveOps
from fastnabla.transition import TransitionTable
from tests.checks import randn, relative_error
from tests.kernel_cases import in_channels_last, on_each_device, poisoned_memory

TABLE = ddim_table(10, eta=0.8)
STEPS = (1, 4, 9)  # σ from 0.6 to 0.02; no log-density is near 0, where its relative error would mean little
POWERS_OF_TWO = {"a": [1, 0.5, 2], "b": [-1, 0.5, 2], "sigma": [1, 0.5, 0.25]}
EXACT = dataclasses.replace(ddim_table(3), **{name: torch.tensor(v).double() for name, v in POWERS_OF_TWO.items()})
ALL = (True, True, True)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {
    "fp32": (FP32, FP32, FP32),
    "bf16": (BF16, BF16, BF16),
    "fp16": (FP16, FP16, FP16),
    "bf16_outputs": (BF16, FP32, FP32),
    "all_differ": (FP16, BF16, FP32),
}
LAYOUTS = {  # a row's shape; which of output, x and x' (or noise) are channels-last
    "contiguous": ((4, 27, 19), (False, False, False)),  # a few positions more than a tile
    "outputs_last": ((4, 27, 19), (True, False, False)),
    "all_last": ((4, 27, 19), (True, True, True)),
    "states_differ": ((8, 9, 7), (False, True, False)),
    "odd": ((5, 7, 9), (True, False, True)),
    "flat": ((77,), (False, False, False)),
    "video": ((3, 2, 5, 7), (True, False, False)),
}
ODD = LAYOUTS["odd"]
CASES = {name: (layout, DTYPES["fp32"]) for name, layout in LAYOUTS.items()}
CASES |= {name: (ODD, dtypes) for name, dtypes in DTYPES.items()}
on_cases = pytest.mark.parametrize(("layout", "dtypes"), CASES.values(), ids=CASES)
on_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
on_guidance = pytest.mark.parametrize("guidance", [None, 5.0])


def batch(
    layout: tuple, guidance: float | None, device: str, dtypes: tuple = DTYPES["fp32"], steps: tuple[int, ...] = STEPS
) -> tuple[list[Tensor], Tensor]:
    """Output, x and an x' that was drawn from the step, and the steps' indices."""
    shape, last = layout
    n = len(steps)
    output, x, noise = (
        randn(rows, *shape, seed=seed, dtype=torch.float64)
        for seed, rows in enumerate((n if guidance is None else 2 * n, n, n))
    )
    step_index = torch.tensor(steps, dtype=torch.int64)
    x_next, _ = PLAIN.guided_step(output, x, noise, TABLE.rows(step_index, x), guidance_scale=guidance)
    tensors = zip((output, x, x_next), dtypes, last, strict=True)
    inputs = [
        in_channels_last(t.to(device, dtype)) if is_last else t.to(device, dtype) for t, dtype, is_last in tensors
    ]
    return inputs, step_index.to(device)


def evaluate(
    operations: ObjectiveOps,
    inputs: Sequence[Tensor],
    steps: Tensor,
    guidance: float | None,
    needs: tuple[bool, ...] = ALL,
    table: TransitionTable = TABLE,
) -> tuple[Tensor, ...]:
    """The log-densities, and gradients of a sum of them, weighted by step, to those inputs that need one."""
    inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needs, strict=True)]
    value = operations.gaussian_log_prob(*inputs, table.rows(steps, inputs[1]), guidance_scale=guidance)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not wanted:
        return (value,)
    return value, *torch.autograd.grad(value, wanted, (3 - steps).to(value.dtype))


def assert_accurate(
    inputs: Sequence[Tensor], steps: Tensor, guidance: float | None, needs: tuple[bool, ...] = ALL
) -> None:
    """The error of each row is at most twice that of plain torch on the same inputs.

    A log-density, which is one number, gets 2⁻²¹, 8 roundings of float32, on top: plain torch may be right by luck.
    Measured: up to 3 roundings.
    """
    truth = evaluate(PLAIN, [tensor.double() for tensor in inputs], steps, guidance, needs)
    plain, fused = (evaluate(operations, inputs, steps, guidance, needs) for operations in (PLAIN, FUSED))
    for exact, ours, theirs in zip(truth, fused, plain, strict=True):
        floor = 2**-21 if exact.dim() == 1 else 0
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        for i in range(len(exact)):
            error, allowed = relative_error(ours[i], exact[i]), 2 * relative_error(theirs[i], exact[i]) + floor
            assert error <= allowed, f"row {i}: {error:.3g}, expected at most {allowed:.3g}"


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@on_each_device
@on_guidance
@on_cases
def test_accuracy(layout, dtypes, guidance, device):
    assert_accurate(*batch(layout, guidance, device, dtypes), guidance)


@on_each_device
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_each_subset_of_gradients(needs, device):
    assert_accurate(*batch(ODD, 5.0, device), 5.0, needs)


@on_each_device
@on_layouts
def test_gradients_are_laid_out_as_their_tensors(layout, device):
    inputs, steps = batch(layout, 5.0, device, DTYPES["all_differ"])
    for gradient, tensor in zip(evaluate(FUSED, inputs, steps, 5.0)[1:], inputs, strict=True):
        assert (gradient.dtype, gradient.stride()) == (tensor.dtype, tensor.stride())


@on_each_device
def test_no_gradient_where_none_is_asked_for(device):
    (output, x, x_next), steps = batch(ODD, 5.0, device)
    with torch.no_grad():
        value = FUSED.gaussian_log_prob(output, x.requires_grad_(), x_next, TABLE.rows(steps, x), guidance_scale=5.0)
    assert not value.requires_grad


@on_each_device
@on_guidance
def test_same_bits_for_any_batch(guidance, device):
    """Two rows in the other order as in the whole batch."""
    inputs, steps = batch(ODD, guidance, device)
    some = torch.tensor([2, 0], device=device)
    of_output = some if guidance is None else torch.cat([some, len(steps) + some])
    picked = [in_channels_last(inputs[0][of_output]), inputs[1][some], in_channels_last(inputs[2][some])]
    value, gradient_output, *gradients = evaluate(FUSED, inputs, steps, guidance)
    expected = value[some], gradient_output[of_output], *(gradient[some] for gradient in gradients)
    assert_same_bits(evaluate(FUSED, picked, steps[some], guidance), expected)


@pytest.mark.slow
@on_each_device
@on_layouts
def test_a_row_does_not_see_another(layout, device):
    """NaN in the middle row alone: a tile that read past its row would spread it."""
    inputs, steps = batch(layout, 5.0, device)
    expected = evaluate(FUSED, inputs, steps, 5.0)
    for tensor in inputs:
        tensor[1::3] = float("nan")
    for clean, poisoned in zip(expected, evaluate(FUSED, inputs, steps, 5.0), strict=True):
        for i in range(len(clean)):
            assert poisoned[i].isnan().all() if i % 3 == 1 else torch.equal(poisoned[i], clean[i])


@pytest.mark.slow
@on_each_device
@on_layouts
def test_same_bits_again_whatever_was_in_memory(layout, device):
    held = batch(layout, 5.0, device, DTYPES["bf16_outputs"])
    expected = evaluate(FUSED, *held, 5.0)
    with poisoned_memory():
        assert_same_bits(evaluate(FUSED, *held, 5.0), expected)


@on_each_device
def test_upstream_gradient_without_memory_of_its_own(device):
    """The gradient of a sum over rows is one number with stride 0."""
    inputs, steps = batch(ODD, 5.0, device)
    x = inputs[1].requires_grad_()
    value = FUSED.gaussian_log_prob(*inputs, TABLE.rows(steps, x), guidance_scale=5.0)
    (summed,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(value, x, torch.ones_like(value))
    assert torch.equal(summed, expected)


@on_each_device
@on_guidance
def test_zero_rows(guidance, device):
    held = batch(ODD, guidance, device, DTYPES["bf16"], steps=())
    for ours, theirs in zip(evaluate(FUSED, *held, guidance), evaluate(PLAIN, *held, guidance), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@on_each_device
def test_no_second_derivative(device):
    inputs, steps = batch(ODD, 5.0, device)
    x = inputs[1].requires_grad_()
    value = FUSED.gaussian_log_prob(*inputs, TABLE.rows(steps, x), guidance_scale=5.0)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(value.sum(), x, create_graph=True)


@pytest.mark.slow
@on_each_device
@settings(max_examples=15)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    steps=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    last=st.tuples(*[st.booleans()] * 3),
    dtypes=st.tuples(*[st.sampled_from([FP32, BF16, FP16])] * 3),
    guidance=st.none() | st.integers(-3, 8).map(float),
    seed=st.integers(0, 99),
)
def test_exact_where_arithmetic_is(shape, steps, last, dtypes, guidance, seed, device):
    """Small integers, and a table of powers of two: no rounding in float32 before gradients are rounded to their
    dtype. The log-density has a logarithm and a sum, of a rounding or two by element."""
    generator, step_index = torch.Generator().manual_seed(seed), torch.tensor(steps, device=device)
    inputs = []
    for copies, dtype, is_last in zip((1 if guidance is None else 2, 1, 1), dtypes, last, strict=True):
        values = torch.randint(-4, 5, (copies * len(steps), *shape), generator=generator).to(device, dtype)
        inputs.append(in_channels_last(values) if is_last and len(shape) > 1 else values)
    value, *gradients = evaluate(FUSED, inputs, step_index, guidance, table=EXACT)
    exact = evaluate(PLAIN, [tensor.double() for tensor in inputs], step_index, guidance, table=EXACT)
    torch.testing.assert_close(value.double(), exact[0], rtol=1e-6, atol=1e-6 * math.prod(shape))
    assert_same_bits(gradients, [gradient.to(dtype) for gradient, dtype in zip(exact[1:], dtypes, strict=True)])
