"""Which steps of a trajectory are trained on besides the last, and which of them have a reverse residual. Both depend only on
the seed and the trajectory's number.

Random numbers are 64-bit words of NumPy's Philox4x64-10 with the key (seed, trajectory). They are the same on every platform
and for every split of the trajectories over calls and ranks. A word modulo n is uniform on 0 … n − 1 to within n / 2⁶⁴.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def draw_stratified(seed: int, first: int, trajectories: int, num_steps: int, strata: int) -> Tensor:
    """The last step, then a uniform step of each of `strata` equal parts of the trajectory.

    This is the reference implementation's low-variance subsampling. The last part may draw the last step again.

    Args:
        seed: of the draws.
        first: number of the first trajectory.
        trajectories: how many, numbered from `first` on.
        num_steps: T.
        strata: steps besides the last.

    Returns:
        Steps to keep, `[trajectories, strata + 1]` int64.

    Raises:
        ValueError: `strata` is not a positive divisor of `num_steps`.
    """
    if strata < 1 or num_steps % strata:
        raise ValueError(
            f"strata = {strata}: must be at least 1 and divide the number of steps, {num_steps}; "
            "change rollout.fraction or sampler.steps so that steps * fraction does."
        )
    width = num_steps // strata
    within = _words(seed, first, trajectories, strata) % width
    return _after_the_last(num_steps, within + width * np.arange(strata, dtype=np.uint64))


def draw_uniform(seed: int, first: int, trajectories: int, num_steps: int, draws: int) -> Tensor:
    """The last step, then `draws` different steps before it, uniform and in random order.

    Arguments and result are those of `draw_stratified`.

    Raises:
        ValueError: there are fewer than `draws` steps before the last, or `draws` is not positive.
    """
    _check_before_last(num_steps, draws)
    order = _words(seed, first, trajectories, num_steps - 1).argsort(axis=1)  # a random permutation
    return _after_the_last(num_steps, order[:, :draws])


def draw_runs(seed: int, first: int, trajectories: int, num_steps: int, draws: int) -> Tensor:
    """The last step, then `draws` adjacent steps before it, from a uniform step on. Step T − 2 is followed by step 0, so
    that all steps before the last have the same probability.

    Arguments and result are those of `draw_stratified`.

    Raises:
        ValueError: there are fewer than `draws` steps before the last, or `draws` is not positive.
    """
    _check_before_last(num_steps, draws)
    start = _words(seed, first, trajectories, 1) % (num_steps - 1)
    return _after_the_last(num_steps, (start + np.arange(draws, dtype=np.uint64)) % (num_steps - 1))


DRAWS: dict[str, Callable[[int, int, int, int, int], Tensor]] = {
    "stratified": draw_stratified,
    "uniform": draw_uniform,
    "runs": draw_runs,
}
"""By the value of `rollout.draw`: seed, number of the first trajectory, trajectories, T, draws → steps to keep."""


def expected_draws(draw: str, num_steps: int, draws: int) -> Tensor:
    """Expected number of times that a trajectory keeps each step, `[num_steps]` float64.

    A sum over the kept steps, weighted by its inverse, is an unbiased estimate of the sum over all steps.

    Args:
        draw: one of `DRAWS`.
        num_steps: T.
        draws: steps besides the last, as given to it.
    """
    drawn_from = num_steps if draw == "stratified" else num_steps - 1
    expected = torch.full((num_steps,), draws / drawn_from, dtype=torch.float64)
    expected[-1] = 1 + (draws / num_steps if draw == "stratified" else 0)
    return expected


def draw_reverse(seed: int, first: int, trajectories: int, inner: int, fraction: float, whole: bool) -> Tensor:
    """The transitions that have a reverse residual: each with probability `fraction`.

    The draw is systematic: of m consecutive transitions, it takes ``fraction · m`` rounded up or down.

    Args:
        seed, first, trajectories: as for `draw_stratified`.
        inner: kept transitions of a trajectory besides the last.
        fraction: in (0, 1].
        whole: draw whole trajectories, instead of transitions of each one. Neighbours that share passes stay together.

    Returns:
        Factors `[trajectories, inner]` float32: 1 / `fraction` for a transition that is drawn, else 0. A sum that is weighted
        by them has the sum over all transitions as its expectation.
    """
    start = torch.from_numpy((_words(seed, first, 1 if whole else trajectories, 1) >> np.uint64(11)) * 2.0**-53)
    places = torch.arange(1 + (trajectories if whole else inner), dtype=torch.float64)
    drawn = (start + fraction * places).floor().diff(dim=1)
    return (drawn.T if whole else drawn).expand(trajectories, inner).float() / fraction


def _words(seed: int, first: int, trajectories: int, count: int) -> np.ndarray:
    """`[trajectories, count]` random uint64."""
    streams = (np.random.Philox(key=[seed, number]) for number in range(first, first + trajectories))
    words = [stream.random_raw(count) for stream in streams]
    return np.array(words, np.uint64).reshape(trajectories, count)


def _check_before_last(num_steps: int, draws: int) -> None:
    if not 1 <= draws < num_steps:
        raise ValueError(f"draws = {draws}: must be between 1 and {num_steps - 1}, the steps before the last.")


def _after_the_last(num_steps: int, steps: np.ndarray) -> Tensor:
    last = np.full((len(steps), 1), num_steps - 1)
    return torch.from_numpy(np.concatenate([last, steps.astype(np.int64)], 1))
