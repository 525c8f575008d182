"""Which steps of a trajectory are trained on, besides its last. What a trajectory draws depends on the seed and its
number alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastnabla.trajectories import buffer_ops


def draw_runs(seed: int, first: int, trajectories: int, num_steps: int, draws: int) -> Tensor:
    """Steps to keep, `[trajectories, draws + 1]` int64: the last, then `draws` adjacent ones from a uniform step on; the
    last but one is followed by the first. Each step before the last is drawn with the same probability.

    Args:
        seed: of the draws.
        first: number of the first trajectory.
        trajectories: how many, numbered from `first` on.
        num_steps: T.
        draws: steps besides the last.

    Raises:
        ValueError: there are not `draws` steps before the last, or `draws` is not positive.
    """
    if not 1 <= draws < num_steps:
        raise ValueError(f"draws = {draws}: must be between 1 and {num_steps - 1}, the steps before the last.")
    start = buffer_ops.draw_stratified(seed, first, trajectories, num_steps - 1, 1)[:, 1:]
    run = (start + torch.arange(draws)) % (num_steps - 1)
    return torch.cat([torch.full((trajectories, 1), num_steps - 1), run], 1)


DRAWS: dict[str, Callable[[int, int, int, int, int], Tensor]] = {
    "stratified": buffer_ops.draw_stratified,
    "uniform": buffer_ops.draw_uniform,
    "runs": draw_runs,
}
"""By the name that `rollout.draw` has: seed, number of the first trajectory, trajectories, T, draws → steps to keep."""


def expected_draws(draw: str, num_steps: int, draws: int) -> Tensor:
    """How often a trajectory keeps each step in expectation, `[num_steps]` float64: what sums over the kept steps are
    weighted by, inversely, to be unbiased estimates of sums over all.

    Args:
        draw: one of `DRAWS`.
        num_steps: T.
        draws: steps besides the last, as given to it.
    """
    drawn_from = num_steps if draw == "stratified" else num_steps - 1
    expected = torch.full((num_steps,), draws / drawn_from, dtype=torch.float64)
    expected[-1] = 1 + (draws / num_steps if draw == "stratified" else 0)
    return expected
