"""The fused cotangent of the reverse residual against plain torch in float64."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastnabla.kernels.common import offsets
from fastnabla.objective.fused import FUSED
from fastnabla.objective.ops import PLAIN, ObjectiveOps
from tests.kernel_cases import (
    DTYPES,
    LAST,
    LAYOUTS,
    Batch,
    Case,
    assert_matches,
    assert_memory_order,
    assert_nan_stays,
    assert_rows_stand_alone,
    assert_same_bits,
    cases,
    huge_batch,
    on_cpu,
    on_each_device,
    on_gpu,
    poisoned_memory,
)

INPUTS = ("output", "x", "x_next", "pixel_score")
NO_REWARD = ("pixel_score",)
"""What is missing for a policy that the reward's gradient does not pass."""


def evaluate(operations: ObjectiveOps, batch: Batch) -> dict[str, Tensor]:
    output, x, x_next, pixel_score = (batch[name] for name in INPUTS)
    return {"cotangent": operations.reverse_cotangent(output, x, x_next, batch.rows, pixel_score, **batch.settings)}


@on_each_device
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [None, 5.0])
@pytest.mark.parametrize("without", [(), NO_REWARD], ids=["reward", "no_reward"])
def test_values(device, without, guidance, prior_weight, dtypes):
    case = Case.of(without=without, guidance_scale=guidance, prior_weight=prior_weight, **DTYPES[dtypes])
    assert_matches(evaluate, case.draw(device))


@on_each_device
@pytest.mark.parametrize(
    "options",
    [
        {"steps": (0, 5)},
        {"steps": (LAST, LAST)},
        {"weighting": "sigma"},
        {"gamma": "sqrt_alpha_bar"},
        {"gamma": "constant"},
        {"beta": 0.0},
        {"prior_weight": 0.0},
    ],
    ids=str,
)
def test_options(device, options):
    assert_matches(evaluate, Case.of(**options).draw(device))


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("without", [(), NO_REWARD], ids=["reward", "no_reward"])
def test_layouts(device, without, layout):
    batch = Case(steps=(3, LAST), without=without, **LAYOUTS[layout]).draw(device)
    assert_memory_order(assert_matches(evaluate, batch)["cotangent"], batch["output"])


@on_each_device
@pytest.mark.parametrize("name", INPUTS)
def test_one_tensor_in_channels_last(device, name):
    """Each is read along its own order, and the cotangent written along that of the output."""
    batch = Case(channels_last=(name,), **DTYPES["mixed"]).draw(device)
    assert_memory_order(assert_matches(evaluate, batch)["cotangent"], batch["output"])


@on_each_device
@pytest.mark.parametrize("name", INPUTS)
def test_strided_rows_are_refused(device, name):
    batch = Case(row=(4, 6, 6)).draw(device)
    batch = batch.replace(**{name: batch[name].transpose(2, 3)})
    with pytest.raises(ValueError, match=rf"^{name} has shape .* and strides"):
        evaluate(FUSED, batch)


@pytest.mark.slow
@settings(max_examples=20)
@given(case=cases([(), NO_REWARD]), seed=st.integers(0, 9))
@on_each_device
def test_anything_else(device, case, seed):
    assert_matches(evaluate, case.draw(device, seed))


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("layout", ["contiguous", "mixed_several_tiles"])
@pytest.mark.parametrize("without", [(), NO_REWARD], ids=["reward", "no_reward"])
def test_a_row_has_the_same_bits_in_every_run_and_batch(device, without, layout):
    batch = Case(without=without, **LAYOUTS[layout], **DTYPES["mixed"]).draw(device)
    assert_same_bits(evaluate(FUSED, batch), evaluate(FUSED, batch))
    assert_rows_stand_alone(evaluate, batch, range(len(batch)))


@pytest.mark.slow
@on_each_device
def test_nothing_is_left_of_uninitialised_memory(device):
    batch = Case(**LAYOUTS["mixed_several_tiles"]).draw(device)
    results = evaluate(FUSED, batch)
    with poisoned_memory():
        assert_same_bits(evaluate(FUSED, batch), results)


@on_each_device
@pytest.mark.parametrize("row", [0, 1], ids=["inner", "last"])
@pytest.mark.parametrize("name", INPUTS)
def test_nan_stays_in_its_row(device, name, row):
    is_nan = assert_nan_stays(evaluate, Case(row=(2, 600), steps=(6, LAST)).draw(device), name, row)
    assert is_nan["cotangent"].any()


@on_each_device
def test_no_rows(device):
    batch = Case(steps=(), **DTYPES["mixed"]).draw(device)
    actual, plain = ({n: (v.shape, v.dtype) for n, v in evaluate(o, batch).items()} for o in (FUSED, PLAIN))
    assert actual == plain
    assert actual["cotangent"] == ((0, 4, 7, 9), torch.bfloat16)


@on_cpu
@pytest.mark.parametrize("step", [-1, LAST + 1])
def test_a_step_that_is_not_in_the_table(device, step):
    with pytest.raises(ValueError, match=rf"^step_index is \[1, {step}, 6\]"):
        evaluate(FUSED, Case().draw(device).at(1, step, 6))


@on_gpu
@pytest.mark.parametrize("step", [-1, LAST + 1])
def test_a_step_that_is_not_in_the_table_makes_nan(device, step):
    is_nan = evaluate(FUSED, Case().draw(device).at(1, step, 6))["cotangent"].isnan().flatten(1)
    assert is_nan.any(1).tolist() == is_nan.all(1).tolist() == [False, True, False] * 2


@on_each_device
def test_the_cotangent_has_no_gradient(device):
    batch = Case().draw(device)
    batch = batch.replace(**{name: batch[name].requires_grad_() for name in INPUTS})
    assert not evaluate(FUSED, batch)["cotangent"].requires_grad


@triton.jit
def _offsets_kernel(out, i_row, positions, C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr):
    o_c, o_p = tl.arange(0, C)[:, None], tl.arange(0, BLOCK_P)[None, :]
    tl.store(out + o_c * BLOCK_P + o_p, offsets(i_row, o_c, o_p, positions, C, LAST, 1))


@on_each_device
@pytest.mark.parametrize("last", [0b10, 0b01], ids=["channels_last", "contiguous"])
def test_offsets_of_rows_are_64_bit(device, last):
    """Row 2²⁰ of 2¹⁴ elements begins at 2³⁴, which 32 bits do not hold."""
    i_row, channels, positions, block = 2**20, 4, 2**12, 8
    out = torch.empty(channels, block, dtype=torch.int64, device=device)
    _offsets_kernel[(1,)](out, i_row, positions, C=channels, BLOCK_P=block, LAST=last)
    inside = (lambda c, p: p * channels + c) if last == 0b10 else (lambda c, p: c * positions + p)
    start = i_row * channels * positions
    assert out.tolist() == [[start + inside(c, p) for p in range(block)] for c in range(channels)]


@pytest.mark.huge
@on_gpu
def test_more_elements_than_32_bits_count(device):
    batch = huge_batch(device, INPUTS)
    assert_rows_stand_alone(evaluate, batch, (len(batch) - 2, len(batch) - 1))
