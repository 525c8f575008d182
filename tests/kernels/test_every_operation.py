"""What each fused operation promises, whatever it computes: accuracy for any input, layouts, bits, NaN, errors, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnabla.objective.fused import FUSED
from fastnabla.objective.ops import PLAIN
from tests.kernel_cases import (
    DTYPES,
    LAST,
    LAYOUTS,
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
    one_row,
    poisoned_memory,
)
from tests.kernels.operations import OPERATIONS, Operation

EACH_LAYOUT = [
    pytest.param(name, marks=pytest.mark.slow if name == "more_tiles_than_are_summed_at_once" else ())
    for name in LAYOUTS
]
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
each_input = pytest.mark.parametrize(
    ("operation", "name"),
    [(operation, name) for operation in OPERATIONS.values() for name in operation.inputs],
    ids=[f"{label}-{name}" for label, operation in OPERATIONS.items() for name in operation.inputs],
)
each_trained = pytest.mark.parametrize(
    ("operation", "name"),
    [(operation, name) for operation in OPERATIONS.values() for name in operation.trained],
    ids=[f"{label}-{name}" for label, operation in OPERATIONS.items() for name in operation.trained],
)


@pytest.mark.slow
@settings(max_examples=80)
@given(data=st.data(), label=st.sampled_from(list(OPERATIONS)), seed=st.integers(0, 9))
@on_each_device
def test_anything(device: str, data: st.DataObject, label: str, seed: int) -> None:
    operation = OPERATIONS[label]
    case = data.draw(cases(list(operation.without)))
    assert_matches(operation.evaluate, case.draw(device, seed))


@on_each_device
@pytest.mark.parametrize("layout", EACH_LAYOUT)
@each_operation
def test_layouts(operation: Operation, layout: str, device: str) -> None:
    batch = Case(steps=(3, LAST), **LAYOUTS[layout]).draw(device)
    results = assert_matches(operation.evaluate, batch)
    for name, tensor in operation.laid_out_as(batch).items():
        assert_memory_order(results[name], tensor)


@pytest.mark.slow
@on_each_device
@each_input
def test_one_tensor_in_channels_last(operation: Operation, name: str, device: str) -> None:
    """Each is read along its own order, and a result written along that of its tensor."""
    batch = Case(channels_last=(name,), **DTYPES["mixed"]).draw(device)
    results = assert_matches(operation.evaluate, batch)
    for result, tensor in operation.laid_out_as(batch).items():
        assert_memory_order(results[result], tensor)


@on_each_device
@each_input
def test_strided_rows_are_refused(operation: Operation, name: str, device: str) -> None:
    batch = Case(row=(4, 6, 6)).draw(device)
    batch = batch.replace(**{name: batch[name].transpose(2, 3)})
    with pytest.raises(ValueError, match=rf"^{name} has shape .* and strides"):
        operation.evaluate(FUSED, batch)


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("layout", ["contiguous", "mixed_several_tiles"])
@each_operation
def test_a_row_has_the_same_bits_in_every_run_and_batch(operation: Operation, layout: str, device: str) -> None:
    for without in {operation.without[0], operation.without[-1]}:
        batch = Case(without=without, **LAYOUTS[layout], **DTYPES["mixed"]).draw(device)
        assert_same_bits(operation.evaluate(FUSED, batch), operation.evaluate(FUSED, batch))
        assert_rows_stand_alone(operation.evaluate, batch, range(len(batch)))


@pytest.mark.slow
@on_each_device
@each_operation
def test_nothing_is_left_of_uninitialised_memory(operation: Operation, device: str) -> None:
    batch = Case(**LAYOUTS["mixed_several_tiles"]).draw(device)
    results = operation.evaluate(FUSED, batch)
    with poisoned_memory():
        assert_same_bits(operation.evaluate(FUSED, batch), results)


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("row", [0, 1], ids=["inner", "last"])
@each_input
def test_nan_stays_in_its_row(operation: Operation, name: str, row: int, device: str) -> None:
    """And out of what the tensor has no influence on there."""
    batch = Case(row=(2, 600), steps=(6, LAST)).draw(device)
    is_nan = assert_nan_stays(operation.evaluate, batch, name, row)
    assert any(found.any() for found in is_nan.values()) == ((name, row == 1) not in operation.unread)


@on_each_device
@each_operation
def test_no_rows(operation: Operation, device: str) -> None:
    batch = Case(steps=(), **DTYPES["mixed"]).draw(device)
    actual, plain = ({n: (v.shape, v.dtype) for n, v in operation.evaluate(o, batch).items()} for o in (FUSED, PLAIN))
    assert actual == plain
    for name, tensor in operation.laid_out_as(batch).items():
        assert actual[name] == ((0, 4, 7, 9), tensor.dtype)


@on_cpu
@pytest.mark.parametrize("step", [-1, LAST + 1])
@each_operation
def test_a_step_that_is_not_in_the_table(operation: Operation, step: int, device: str) -> None:
    with pytest.raises(ValueError, match=rf"^step_index is \[1, {step}, 6\]"):
        operation.evaluate(FUSED, Case().draw(device).at(1, step, 6))


@on_gpu
@pytest.mark.parametrize("step", [-1, LAST + 1])
@each_operation
def test_a_step_that_is_not_in_the_table_makes_nan(operation: Operation, step: int, device: str) -> None:
    first, *_ = operation.evaluate(FUSED, Case().draw(device).at(1, step, 6)).values()
    rows = [one_row(first.isnan(), row, 3) for row in range(3)]
    assert [row.any().item() for row in rows] == [row.all().item() for row in rows] == [False, True, False]


@on_each_device
@each_operation
def test_gradients_are_to_the_trained_tensors_alone(operation: Operation, device: str) -> None:
    batch = Case().draw(device)
    batch = batch.replace(**{name: batch[name].requires_grad_() for name in operation.inputs})
    first, *_ = operation.compute(FUSED, batch).values()
    assert first.requires_grad == bool(operation.trained)
    if operation.trained:
        leaves = [batch[name] for name in operation.inputs]
        gradients = torch.autograd.grad(first.sum(), leaves, allow_unused=True)
        found = [name for name, g in zip(operation.inputs, gradients, strict=True) if g is not None]
        assert found == list(operation.trained)


@on_each_device
@each_trained
def test_results_are_the_same_without_gradients(operation: Operation, name: str, device: str) -> None:
    batch = Case().draw(device)
    with torch.no_grad():
        alone = operation.compute(FUSED, batch.replace(**{name: batch[name].requires_grad_()}))
    assert not any(result.requires_grad for result in alone.values())
    together = operation.evaluate(FUSED, batch)
    assert_same_bits(alone, {result: together[result] for result in alone})


@on_each_device
@each_trained
def test_gradients_have_no_gradient(operation: Operation, name: str, device: str) -> None:
    """Asking for their graph says so, instead of returning one without the second derivatives."""
    batch = Case().draw(device)
    leaf = batch[name].requires_grad_()
    first, *_ = operation.compute(FUSED, batch).values()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(first.sum(), leaf, create_graph=True)


@pytest.mark.huge
@on_gpu
@each_operation
def test_more_elements_than_32_bits_count(operation: Operation, device: str) -> None:
    batch = huge_batch(device, tuple(dict.fromkeys((*operation.inputs, "x"))))
    assert_rows_stand_alone(operation.evaluate, batch, (len(batch) - 2, len(batch) - 1))
