"""The fused forward residual against plain torch in float64."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.published import ddim_table
from fastnabla.objective.balance import ForwardBalance
from fastnabla.objective.fused import FUSED
from fastnabla.objective.gaussian import step_score
from fastnabla.objective.ops import PLAIN, ObjectiveOps
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionRows, TransitionTable
from tests.checks import randn, relative_error
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

INPUTS = ("output", "output_ref", "x", "x_next", "reward_score_next", "flow_next", "output_old")


def call(operations: ObjectiveOps, batch: Batch) -> ForwardBalance:
    output, output_ref, x, x_next, *others = (batch[name] for name in INPUTS)
    return operations.forward_balance(output, output_ref, x, x_next, batch.rows, *others, **batch.settings)


def evaluate(operations: ObjectiveOps, batch: Batch) -> dict[str, Tensor]:
    """Loss, statistics, and the gradients under random weights of the rows."""
    leaves = {n: batch[n].detach().requires_grad_() for n in ("output", "flow_next") if batch[n] is not None}
    result = call(operations, batch.replace(**leaves))
    gradients = torch.autograd.grad((batch["upstream"] * result.loss).sum(), leaves.values())
    values = {field.name: getattr(result, field.name).detach() for field in dataclasses.fields(result)}
    return values | dict(zip([f"gradient of {name}" for name in leaves], gradients, strict=True))


@on_each_device
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [None, 5.0])
def test_values_and_gradients(device, guidance, prior_weight, dtypes):
    case = Case.of(guidance_scale=guidance, prior_weight=prior_weight, **DTYPES[dtypes])
    assert_matches(evaluate, case.draw(device))


@on_each_device
@pytest.mark.parametrize(
    "options",
    [
        {"steps": (0, 5)},
        {"steps": (LAST, LAST)},
        {"without": ("flow_next",)},
        {"without": ("output_old",)},
        {"without": ("flow_next", "output_old")},
        {"trust_region_weight": 0.0},
        {"weighting": "sigma"},
        {"weighting": "sigma", "prior_weight": 1.0},
        {"gamma": "sqrt_alpha_bar"},
        {"gamma": "constant"},
        {"beta": 0.0, "prior_weight": 0.0},
    ],
    ids=str,
)
def test_options(device, options):
    assert_matches(evaluate, Case.of(**options).draw(device))


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    batch = Case(steps=(3, LAST), **LAYOUTS[layout]).draw(device)
    results = assert_matches(evaluate, batch)
    assert_memory_order(results["gradient of output"], batch["output"])
    assert_memory_order(results["gradient of flow_next"], batch["flow_next"])


@on_each_device
@pytest.mark.parametrize("name", INPUTS)
def test_strided_rows_are_refused(device, name):
    batch = Case(row=(4, 6, 6)).draw(device)
    batch = batch.replace(**{name: batch[name].transpose(2, 3)})
    with pytest.raises(ValueError, match=rf"^{name} has shape .* and strides"):
        evaluate(FUSED, batch)


@pytest.mark.slow
@settings(max_examples=15)
@given(case=cases([(), ("flow_next",), ("output_old",)]), seed=st.integers(0, 9))
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
    batch = Case(row=(2, 600), steps=(6, LAST)).draw(device)
    is_nan = assert_nan_stays(evaluate, batch, name, row)
    assert is_nan["loss"][row]
    in_residual = name != "output_old" and (name, row) != ("flow_next", 1)
    assert is_nan["max_residual"][row] == in_residual


@on_each_device
def test_no_rows(device):
    batch = Case(steps=(), **DTYPES["mixed"]).draw(device)
    actual, plain = ({n: (v.shape, v.dtype) for n, v in evaluate(o, batch).items()} for o in (FUSED, PLAIN))
    assert actual == plain
    assert actual["gradient of output"] == ((0, 4, 7, 9), torch.bfloat16)


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
def test_gradients_flow_to_output_and_flow_alone(device):
    batch = Case().draw(device)
    batch = batch.replace(**{name: batch[name].requires_grad_() for name in INPUTS})
    loss = call(FUSED, batch).loss
    gradients = torch.autograd.grad(loss.sum(), [batch[name] for name in INPUTS], allow_unused=True)
    assert [name for name, g in zip(INPUTS, gradients, strict=True) if g is not None] == ["output", "flow_next"]


@on_each_device
def test_upstream_gradients_may_be_one_number(device):
    """As those of a sum are: all rows read the same element."""
    batch = Case().draw(device)
    output = batch["output"].requires_grad_()
    loss = call(FUSED, batch).loss
    (actual,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, output, torch.ones_like(loss))
    assert torch.equal(actual, expected)


@on_each_device
def test_without_gradients(device):
    batch = Case().draw(device)
    with torch.no_grad():
        result = call(FUSED, batch)
    assert not result.loss.requires_grad
    assert torch.equal(result.loss, evaluate(FUSED, batch)["loss"])


@on_each_device
@pytest.mark.parametrize("name", ["output", "flow_next"])
def test_gradients_have_no_gradient(device, name):
    """Asking for their graph says so, instead of returning one without the second derivatives."""
    batch = Case().draw(device)
    leaf = batch[name].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(call(FUSED, batch).loss.sum(), leaf, create_graph=True)


@on_each_device
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_noise_costs_no_digits(device, state_dtype):
    """At the last three of 50 steps (σ from 0.10 to 0.02), for bfloat16 outputs of a policy 1e-2 away from the
    pretrained one: error of the residual against float64 on the same inputs.

    Measured: 2.5e-8 to 4e-8 fused; 2.8e-6 to 5.7e-6, at least 75 times as much, as a difference of two scores in
    float32; 0.12 to 0.37 as a difference of two scores in bfloat16. With bfloat16 states, the same.
    """
    table = ddim_table(50)
    columns = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    # Followed by a copy, the last step is an inner one: its residual can be read from the gradient of the flow.
    table = TransitionTable(**{name: torch.cat([column, column[-1:]]) for name, column in columns.items()})
    x = randn(3, 4, 16, 16)
    rows = table.rows(torch.tensor([47, 48, 49]), x)
    o_ref = randn(*x.shape, seed=1)
    o = o_ref + 1e-2 * randn(*x.shape, seed=2)
    x_next = rows.a * x + rows.b * o + rows.sigma * randn(*x.shape, seed=3)
    o, o_ref, x, x_next = (
        tensor.to(device, dtype)
        for tensor, dtype in ((o, torch.bfloat16), (o_ref, torch.bfloat16), (x, state_dtype), (x_next, state_dtype))
    )
    rows, exact = (table.rows(rows.step_index.to(device), like) for like in (x, x.double()))
    flow = torch.zeros_like(x, dtype=torch.float32).requires_grad_()
    settings = {"objective": Objective(beta=0.0), "guidance_scale": None}
    loss = FUSED.forward_balance(o, o_ref, x, x_next, rows, torch.zeros_like(flow), flow, **settings).loss
    (gradient,) = torch.autograd.grad(loss.sum(), flow)
    fused = -x[0].numel() / 2 * gradient  # loss = mean (residual − flow)²

    def difference(rows: TransitionRows, cast: Callable[[Tensor], Tensor]) -> Tensor:
        return step_score(cast(o), cast(x), cast(x_next), rows) - step_score(cast(o_ref), cast(x), cast(x_next), rows)

    def low_score(o: Tensor) -> Tensor:
        a, b, sigma = (column.bfloat16() for column in (rows.a, rows.b, rows.sigma))
        return -(x_next.bfloat16() - a * x.bfloat16() - b * o) / sigma**2

    truth = difference(exact, Tensor.double)
    for i in range(3):
        error = relative_error(fused[i], truth[i])
        assert error < 1e-7
        assert relative_error(difference(rows, Tensor.float)[i], truth[i]) > 30 * error
        assert relative_error((low_score(o) - low_score(o_ref))[i], truth[i]) > 0.05


@pytest.mark.huge
@on_gpu
def test_more_elements_than_32_bits_count(device):
    batch = huge_batch(device, ("output", "output_ref", "x", "x_next", "reward_score_next", "flow_next"))
    assert_rows_stand_alone(evaluate, batch, (len(batch) - 2, len(batch) - 1))
