"""The fused reverse residual against plain torch in float64."""

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
    PAIRS,
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

INPUTS = ("score", "score_ref", "flow", "reward_score", "output", "output_ref")
WHOLE_SCORES = PAIRS
"""What is missing where the scores need no direct parts."""
AT_PREDICTION = ("reward_score",)
"""What is missing where the reward's score is that of the clean prediction."""


def call(operations: ObjectiveOps, batch: Batch) -> Tensor:
    return operations.reverse_balance(
        batch["score"],
        batch["score_ref"],
        batch.rows,
        batch["flow"],
        batch["reward_score"],
        batch["pixel_score"] if batch["reward_score"] is None else None,
        None if batch["output"] is None else (batch["output"], batch["output_ref"]),
        **batch.settings,
    )


def evaluate(operations: ObjectiveOps, batch: Batch) -> dict[str, Tensor]:
    """Loss, and the gradient of the flow under random weights of the rows."""
    flow = batch["flow"].detach().requires_grad_()
    loss = call(operations, batch.replace(flow=flow))
    (gradient,) = torch.autograd.grad((batch["upstream"] * loss).sum(), flow)
    return {"loss": loss.detach(), "gradient of flow": gradient}


@on_each_device
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [None, 5.0])
def test_values_and_gradients(device, guidance, prior_weight, dtypes):
    """Of products of the cotangents and pixel scores; whole scores are among the options."""
    case = Case.of(guidance_scale=guidance, prior_weight=prior_weight, without=AT_PREDICTION, **DTYPES[dtypes])
    assert_matches(evaluate, case.draw(device))


@on_each_device
@pytest.mark.parametrize(
    "options",
    [
        {"without": WHOLE_SCORES},
        {"without": WHOLE_SCORES, "prior_weight": 1.0, "weighting": "sigma"},
        {"without": (*WHOLE_SCORES, *AT_PREDICTION), "guidance_scale": None},
        {"without": (), "gamma": "constant"},
        {"without": AT_PREDICTION, "gamma": "constant"},
        {"without": AT_PREDICTION, "gamma": "sqrt_alpha_bar"},
        {"without": AT_PREDICTION, "weighting": "sigma"},
        {"without": AT_PREDICTION, "steps": (0, 5)},
        {"without": AT_PREDICTION, "beta": 0.0},
        {"without": AT_PREDICTION, "prior_weight": 0.0},
    ],
    ids=str,
)
def test_options(device, options):
    assert_matches(evaluate, Case.of(**options).draw(device))


@on_each_device
@pytest.mark.parametrize("weighting", ["score", "sigma"])
def test_last_rows_have_no_reverse_residual(device, weighting):
    results = evaluate(FUSED, Case.of(steps=(LAST, 0, LAST), weighting=weighting).draw(device))
    assert (results["loss"] > 0).tolist() == [False, True, False]
    assert results["gradient of flow"].flatten(1).any(1).tolist() == [False, True, False]


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
@given(case=cases([(), WHOLE_SCORES, AT_PREDICTION, (*WHOLE_SCORES, *AT_PREDICTION)]), seed=st.integers(0, 9))
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
    """And out of last rows, whose residual is not wanted."""
    is_nan = assert_nan_stays(evaluate, Case(row=(2, 600), steps=(6, LAST)).draw(device), name, row)
    assert is_nan["loss"].tolist() == [row == 0, False]


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
    batch = huge_batch(device, (*INPUTS, "x"))
    assert_rows_stand_alone(evaluate, batch, (len(batch) - 2, len(batch) - 1))
