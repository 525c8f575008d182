"""Stored rollouts of several ranks: saved as those of one process, and taken from them again."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastnabla.distributed.world import ALONE
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.pooled_buffer import PooledBuffer
from tests.checks import append_all, randn

COUNT, KEPT, NUM_STEPS, SHAPE = 5, 2, 3, (2, 3)
RANKS = [torch.tensor([0, 1, 4]), torch.tensor([2, 3])]
ALL = torch.arange(COUNT)


def empty(trajectories: int) -> TrajectoryBuffer:
    """With room for two rollouts."""
    buffer = TrajectoryBuffer(2 * trajectories, NUM_STEPS, KEPT, SHAPE)
    buffer.keep_reference(with_product=True)
    return buffer


def add_rollout(buffer: TrajectoryBuffer, number: int, own: Tensor) -> None:
    """Store the trajectories `own` of a rollout. The reference's part of some is cached."""
    slots = buffer.reserve(torch.tensor([[2, i % 2] for i in range(COUNT)])[own], 10 * number + own)
    states, outputs = randn(COUNT, NUM_STEPS + 1, *SHAPE, seed=number), randn(COUNT, NUM_STEPS, *SHAPE, seed=-number)
    append_all(buffer, slots, states[own], outputs[own])
    buffer.reward[slots] = number + own / 10
    known = slots[own % 2 == 0]
    values = randn(COUNT, KEPT, *SHAPE, seed=100 + number)[own[own % 2 == 0]].flatten(0, 1)
    buffer.reference.of(buffer.transitions(known)).write(values, -values)


def two_rollouts(own: Tensor) -> TrajectoryBuffer:
    """The second and the third, so that the oldest trajectory is not in slot 0."""
    buffer = empty(len(own))
    for number in (1, 2):
        add_rollout(buffer, number, own)
    buffer.forget(len(own))
    add_rollout(buffer, 3, own)
    return buffer


def contents(buffer: TrajectoryBuffer) -> list[Tensor]:
    """All that is stored, oldest first, but the numbers of the slots."""
    index, cache = buffer.transitions(), buffer.reference
    batch = buffer.gather(index)
    fields = [getattr(batch, name) for name in ("x", "x_next", "model_output", "step_index", "prompt", "reward")]
    known = cache.known[index]
    return [*fields, known, cache.output[index][known], cache.product[index][known]]


def assert_same(ours: TrajectoryBuffer, theirs: TrajectoryBuffer) -> None:
    pairs = zip(contents(ours), contents(theirs), strict=True)
    assert len(ours) == len(theirs) and all(torch.equal(one, other) for one, other in pairs)


def saved_by_ranks() -> dict[str, Any]:
    """What two ranks save together. Alone, each has zeros in place of the other's rows."""
    first, second = (PooledBuffer(two_rollouts(own), ALONE, own, COUNT).state_dict() for own in RANKS)
    caches = first.pop("reference"), second.pop("reference")
    total = {n: value + second[n] if isinstance(value, Tensor) else value for n, value in first.items()}
    return total | {"reference": {name: caches[0][name] + caches[1][name] for name in caches[0]}}


def test_one_process_takes_what_ranks_saved() -> None:
    whole = empty(COUNT)
    whole.load_state_dict(saved_by_ranks())
    assert_same(whole, two_rollouts(ALL))
    whole.forget(COUNT)
    add_rollout(whole, 4, ALL)
    assert whole.gather(whole.transitions()).prompt.unique().tolist() == [*range(30, 35), *range(40, 45)]


@pytest.mark.parametrize("own", RANKS, ids=["rank 0", "rank 1"])
@pytest.mark.parametrize(
    "saved", [saved_by_ranks, lambda: two_rollouts(ALL).state_dict()], ids=["ranks", "one process"]
)
def test_a_rank_takes_its_rows_from_any_number_of_processes(saved, own: Tensor) -> None:
    part = empty(len(own))
    PooledBuffer(part, ALONE, own, COUNT).load_state_dict(saved())
    assert_same(part, two_rollouts(own))


def test_a_state_that_lacks_something_changes_nothing() -> None:
    part = empty(2)
    for name in ("first", "x", "reference"):
        state = {key: value for key, value in saved_by_ranks().items() if key != name}
        with pytest.raises(ValueError, match=f"the state lacks {name}"):
            PooledBuffer(part, ALONE, RANKS[1], COUNT).load_state_dict(state)
        assert len(part) == 0
