"""Adjacent transitions that share network passes: the same gradients, fewer passes."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from fastnabla.methods.micro_batches import MicroBatch, cut
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.trajectories.transitions import LazyTransitions, Transitions
from tests.checks import BACKENDS, assert_gradients, randn
from tests.golden import GoldenStep
from tests.small_step import shared_step

PROMPTS = 2


def run_of(golden: GoldenStep, trajectory: int, steps: list[int]) -> Transitions:
    """Transitions of adjacent `steps` of one trajectory, whose states are shared by neighbours."""
    shape, count = golden.transitions.x.shape[1:], len(steps)
    states = randn(count + 1, *shape, seed=trajectory)
    step_index = torch.tensor(steps)
    number = torch.full((count,), trajectory)
    return Transitions(
        x=states[:-1],
        x_next=states[1:],
        model_output=randn(count, *shape, seed=100 + trajectory),
        step_index=step_index,
        prompt=number % PROMPTS,
        trajectory=number,
        reward=torch.zeros(count),
    )


def joined(*parts: Transitions) -> Transitions:
    fields = (field.name for field in dataclasses.fields(Transitions))
    return Transitions(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})


def batch(golden: GoldenStep) -> Transitions:
    """Two runs, a lone transition, and the last transition of each trajectory, in no order."""
    last = len(golden.table) - 1
    parts = [run_of(golden, 0, [2, 3, 4]), run_of(golden, 1, [0, 1]), run_of(golden, 2, [5])]
    whole = joined(*parts, *(run_of(golden, trajectory, [last]) for trajectory in range(3)))
    return whole[torch.tensor([4, 6, 1, 0, 8, 5, 3, 7, 2])]


def gradients(golden: GoldenStep, step: BalanceStep, transitions: Transitions) -> dict[str, Tensor]:
    for parameter in step.parameters:
        parameter.grad = None
    step(transitions)
    return {name: gradient.clone() for name, gradient in golden.gradients().items()}


OBJECTIVES = (
    {},
    {"reverse_weight": 0.0},
    {"reward_gradient": "lookahead_detached"},
    {"reward_gradient": "lookahead_detached", "reverse_weight": 0.0},
    {"reward_gradient": "terminal"},
    {"prior_weight": 0.7, "weighting": "sigma", "gamma": "sqrt_alpha_bar"},
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "micro_batch", "backend"),
    [
        *itertools.product(OBJECTIVES, (100, 4, 1), ("torch",)),
        *(pytest.param(OBJECTIVES[i], 4, "triton", marks=BACKENDS[1].marks) for i in (0, 3, 4, -1)),
    ],
    ids=str,
)
def test_shared_passes_give_the_same_gradients(objective, micro_batch, backend):
    golden = shared_step()
    transitions = batch(golden)
    expected = gradients(golden, golden.step(100, **objective), transitions)
    actual = gradients(golden, golden.step(micro_batch, backend, reuse_passes=True, **objective), transitions)
    assert_gradients(actual, expected)


@pytest.mark.parametrize(
    ("objective", "passes", "decodes"),
    [
        # 6 L + 2 of each micro-batch, and one decode of each of its L + 1 states a run.
        ({}, (6 * 6 + 2 * 3) / 6, 9),
        # Without the reverse residual: reference 1, policy 1, to its input 1, to the parameters 1, and 2 of each tail.
        ({"reverse_weight": 0.0}, (4 * 6 + 2 * 3) / 6, 6),
        # Without the UNet's Jacobian: 5, and 1 of each tail.
        ({"reward_gradient": "lookahead_detached"}, (5 * 6 + 3) / 6, 9),
        ({"reward_gradient": "terminal"}, 5, 0),
    ],
)
def test_passes_and_decodes(objective, passes, decodes):
    golden = shared_step()
    decoded = []

    class Counter(nn.Module):
        def forward(self, images, prompts):
            decoded.extend(prompts)
            return golden.reward(images, prompts)

    counted = dataclasses.replace(golden, reward=Counter())
    report = counted.step(100, reuse_passes=True, **objective)(batch(golden))
    assert report.passes["inner"] == pytest.approx(passes)
    assert report.passes["last"] == 3
    assert len(decoded) == decodes + 3


def cut_all(selection: LazyTransitions, size: int, reuse_passes: bool = False) -> list[MicroBatch]:
    rows = torch.arange(len(selection))
    return cut(selection, len(shared_step().table), rows, size, reuse_passes=reuse_passes)


def test_without_reuse_no_row_is_shared():
    for part in cut_all(batch(shared_step()).select(), 100):
        assert len(part.shared) == 0
        assert part.next_state_index().tolist() == list(range(len(part.rows), 2 * len(part.rows)))


def test_neighbours_share():
    selection = batch(shared_step()).select()
    inner, last = cut_all(selection, 100, reuse_passes=True)
    assert (inner.last, last.last) == (False, True)
    names = list(zip(selection.trajectory[inner.rows].tolist(), selection.step_index[inner.rows].tolist(), strict=True))
    assert names == [(0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (2, 5)]
    assert inner.next_row.tolist() == [1, 2, -1, 4, -1, -1]
    assert inner.shared.tolist() == [1, 2, 4]
    assert inner.unshared.tolist() == [2, 4, 5]
    assert inner.next_state_index().tolist() == [1, 2, 6, 4, 7, 8]
    assert len(last.shared) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7])
def test_cuts_are_even_and_complete(size):
    selection = batch(shared_step()).select()
    parts = cut_all(selection, size)
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(len(selection)))
    for last in (False, True):
        sizes = [len(part.rows) for part in parts if part.last == last]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1


def test_passes_of_a_sampler_that_is_no_chain_cannot_be_reused():
    golden = shared_step()
    table = dataclasses.replace(golden.table, timestep_next=golden.table.timestep_next.clone())
    table.timestep_next[1] += 1
    with pytest.raises(ValueError, match="does not end where the next begins"):
        dataclasses.replace(golden, table=table).step(4, reuse_passes=True)
