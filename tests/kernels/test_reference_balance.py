"""The fused reverse residual whose target follows the reference, against plain torch in float64."""

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

INPUTS = ("vjp", "flow", "reward_score_next", "flow_next", "reward_score")
NO_FLOW_NEXT = ("flow_next",)
"""What is missing in a batch of last rows."""
AT_PREDICTION = ("reward_score",)
"""What is missing where the reward's score is that of the clean prediction."""


def call(operations: ObjectiveOps, batch: Batch) -> Tensor:
    return operations.reference_balance(
        batch["vjp"],
        batch.rows,
        batch["flow"],
        batch["reward_score_next"],
        batch["flow_next"],
        batch["reward_score"],
        batch["pixel_score"] if batch["reward_score"] is None else None,
        objective=batch.objective,
    )


def evaluate(operations: ObjectiveOps, batch: Batch) -> dict[str, Tensor]:
    """Loss, and the gradient of the flow under random weights of the rows."""
    flow = batch["flow"].detach().requires_grad_()
    loss = call(operations, batch.replace(flow=flow))
    (gradient,) = torch.autograd.grad((batch["upstream"] * loss).sum(), flow)
    return {"loss": loss.detach(), "gradient of flow": gradient}


@on_each_device
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("without", [(), AT_PREDICTION, NO_FLOW_NEXT], ids=str)
def test_values_and_gradients(device, without, dtypes):
    assert_matches(evaluate, Case.of(without=without, **DTYPES[dtypes]).draw(device))


@on_each_device
@pytest.mark.parametrize(
    "options",
    [
        {"gamma": "constant"},
        {"gamma": "sqrt_alpha_bar"},
        {"gamma": "sqrt_alpha_bar", "without": AT_PREDICTION},
        {"weighting": "sigma"},
        {"weighting": "sigma", "without": (*AT_PREDICTION, *NO_FLOW_NEXT)},
        {"steps": (0, 5)},
        {"steps": (LAST, LAST), "without": NO_FLOW_NEXT},
        {"beta": 0.0},
        {"guidance_scale": None},
    ],
    ids=str,
)
def test_options(device, options):
    assert_matches(evaluate, Case.of(**options).draw(device))


@on_each_device
@pytest.mark.parametrize("weighting", ["score", "sigma"])
def test_last_rows_do_not_see_the_next_flow(device, weighting):
    """Their residual is the same whatever g(x') is, and is not 0."""
    batch = Case.of(steps=(LAST, 0, LAST), weighting=weighting).draw(device)
    one, other = (evaluate(FUSED, b)["loss"] for b in (batch, batch.replace(flow_next=batch["flow_next"] + 1)))
    assert (one == other).tolist() == [True, False, True]
    assert (one > 0).all()


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    batch = Case(steps=(3, LAST), **LAYOUTS[layout]).draw(device)
    results = assert_matches(evaluate, batch)
    assert_memory_order(results["gradient of flow"], batch["flow"])


@on_each_device
@pytest.mark.parametrize("name", INPUTS)
def test_strided_rows_are_refused(device, name):
    batch = Case(row=(4, 6, 6)).draw(device)
    batch = batch.replace(**{name: batch[name].transpose(2, 3)})
    with pytest.raises(ValueError, match=rf"^{name} has shape .* and strides"):
        evaluate(FUSED, batch)


@pytest.mark.slow
@settings(max_examples=20)
@given(case=cases([(), NO_FLOW_NEXT, AT_PREDICTION, (*NO_FLOW_NEXT, *AT_PREDICTION)]), seed=st.integers(0, 9))
@on_each_device
def test_anything_else(device, case, seed):
    assert_matches(evaluate, case.draw(device, seed))


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("layout", ["contiguous", "mixed_several_tiles"])
def test_a_row_has_the_same_bits_in_every_run_and_batch(device, layout):
    batch = Case(**LAYOUTS[layout], **DTYPES["mixed"]).draw(device)
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
    """And the next flow's out of last rows, which do not use it."""
    is_nan = assert_nan_stays(evaluate, Case(row=(2, 600), steps=(6, LAST)).draw(device), name, row)
    assert is_nan["loss"][row] == ((name, row) != ("flow_next", 1))


@on_each_device
def test_no_rows(device):
    batch = Case(steps=(), **DTYPES["mixed"]).draw(device)
    actual, plain = ({n: (v.shape, v.dtype) for n, v in evaluate(o, batch).items()} for o in (FUSED, PLAIN))
    assert actual == plain
    assert actual["gradient of flow"] == ((0, 4, 7, 9), torch.float16)


@on_cpu
@pytest.mark.parametrize("step", [-1, LAST + 1])
def test_a_step_that_is_not_in_the_table(device, step):
    with pytest.raises(ValueError, match=rf"^step_index is \[1, {step}, 6\]"):
        evaluate(FUSED, Case().draw(device).at(1, step, 6))


@on_gpu
@pytest.mark.parametrize("step", [-1, LAST + 1])
def test_a_step_that_is_not_in_the_table_makes_nan(device, step):
    results = evaluate(FUSED, Case().draw(device).at(1, step, 6))
    assert results["loss"].isnan().tolist() == [False, True, False]


@on_each_device
def test_gradients_flow_to_flow_alone(device):
    batch = Case().draw(device)
    batch = batch.replace(**{name: batch[name].requires_grad_() for name in INPUTS})
    gradients = torch.autograd.grad(call(FUSED, batch).sum(), [batch[name] for name in INPUTS], allow_unused=True)
    assert [name for name, g in zip(INPUTS, gradients, strict=True) if g is not None] == ["flow"]


@on_each_device
def test_without_gradients(device):
    batch = Case().draw(device)
    loss = call(FUSED, batch)
    assert not loss.requires_grad
    assert torch.equal(loss, evaluate(FUSED, batch)["loss"])


@on_each_device
def test_gradients_have_no_gradient(device):
    """Asking for their graph says so, instead of returning one without the second derivatives."""
    batch = Case().draw(device)
    flow = batch["flow"].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(call(FUSED, batch).sum(), flow, create_graph=True)


@pytest.mark.huge
@on_gpu
def test_more_elements_than_32_bits_count(device):
    batch = huge_batch(device, INPUTS)
    assert_rows_stand_alone(evaluate, batch, (len(batch) - 2, len(batch) - 1))
