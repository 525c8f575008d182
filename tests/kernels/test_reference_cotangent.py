"""The fused cotangent of the reference policy against plain torch in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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

INPUTS = ("output", "reward_score_next", "flow_next", "pixel_score")
NO_REWARD = ("pixel_score",)
"""What is missing if the reward's gradient does not pass through the reference."""
NO_FLOW = ("flow_next",)
"""What is missing in a batch of last rows."""
WITHOUT = {"all": (), "no_reward": NO_REWARD, "no_flow": NO_FLOW, "neither": (*NO_REWARD, *NO_FLOW)}
each_without = pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT)


def evaluate(operations: ObjectiveOps, batch: Batch) -> dict[str, Tensor]:
    output, *scores = (batch[name] for name in INPUTS)
    return {"cotangent": operations.reference_cotangent(output, batch.rows, *scores, **batch.settings)}


@on_each_device
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("guidance", [None, 5.0])
@each_without
def test_values(device, without, guidance, dtypes):
    case = Case.of(without=without, guidance_scale=guidance, **DTYPES[dtypes])
    assert_matches(evaluate, case.draw(device))


@on_each_device
@pytest.mark.parametrize(
    "options",
    [
        {"steps": (0, 5)},
        {"steps": (LAST, LAST)},
        {"gamma": "sqrt_alpha_bar"},
        {"gamma": "constant"},
        {"beta": 0.0},
    ],
    ids=str,
)
def test_options(device, options):
    assert_matches(evaluate, Case.of(**options).draw(device))


@on_each_device
def test_the_output_is_not_read(device):
    batch = Case().draw(device)
    unread = batch.replace(output=torch.full_like(batch["output"], float("nan")))
    assert_same_bits(evaluate(FUSED, batch), evaluate(FUSED, unread))


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
@each_without
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
@given(case=cases(list(WITHOUT.values())), seed=st.integers(0, 9))
@on_each_device
def test_anything_else(device, case, seed):
    assert_matches(evaluate, case.draw(device, seed))


@on_each_device
@pytest.mark.parametrize("layout", ["contiguous", "mixed_several_tiles"])
@each_without
def test_a_row_has_the_same_bits_in_every_run_and_batch(device, without, layout):
    batch = Case(without=without, **LAYOUTS[layout], **DTYPES["mixed"]).draw(device)
    assert_same_bits(evaluate(FUSED, batch), evaluate(FUSED, batch))
    assert_rows_stand_alone(evaluate, batch, range(len(batch)))


@on_each_device
def test_nothing_is_left_of_uninitialised_memory(device):
    batch = Case(**LAYOUTS["mixed_several_tiles"]).draw(device)
    results = evaluate(FUSED, batch)
    with poisoned_memory():
        assert_same_bits(evaluate(FUSED, batch), results)


@on_each_device
@pytest.mark.parametrize("row", [0, 1], ids=["inner", "last"])
@pytest.mark.parametrize("name", INPUTS[1:])
def test_nan_stays_in_its_row(device, name, row):
    """And the next flow's out of last rows, which do not use it."""
    is_nan = assert_nan_stays(evaluate, Case(row=(2, 600), steps=(6, LAST)).draw(device), name, row)
    assert is_nan["cotangent"].any() == ((name, row) != ("flow_next", 1))


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


@pytest.mark.huge
@on_gpu
def test_more_elements_than_32_bits_count(device):
    batch = huge_batch(device, INPUTS)
    assert_rows_stand_alone(evaluate, batch, (len(batch) - 2, len(batch) - 1))
