"""Which steps of a trajectory are trained on."""

import torch
from torch import Tensor


def draw_stratified(trajectories: int, num_steps: int, strata: int, generator: torch.Generator) -> Tensor:
    """Steps to keep, `[trajectories, strata + 1]` int64: one uniform draw in each of `strata` equal parts of the
    trajectory, and the last step always.

    This is the reference implementation's low-variance subsampling. A stratum may draw the last step again.

    Raises:
        ValueError: `strata` is not a positive divisor of `num_steps`.
    """
    if strata < 1 or num_steps % strata:
        raise ValueError(
            f"strata = {strata}: must be at least 1 and divide the number of steps, {num_steps}; "
            "change rollout.fraction or sampler.steps so that steps * fraction does."
        )
    width = num_steps // strata
    within = torch.randint(0, width, (trajectories, strata), generator=generator)
    last = torch.full((trajectories, 1), num_steps - 1)
    return torch.cat([last, torch.arange(strata) * width + within], 1)


def draw_uniform(trajectories: int, num_steps: int, draws: int, generator: torch.Generator) -> Tensor:
    """Steps to keep, `[trajectories, draws + 1]` int64: `draws` different steps before the last, and the last.

    Raises:
        ValueError: there are not `draws` steps before the last, or `draws` is not positive.
    """
    if not 1 <= draws < num_steps:
        raise ValueError(f"draws = {draws}: must be between 1 and {num_steps - 1}, the steps before the last.")
    order = torch.rand(trajectories, num_steps - 1, generator=generator).argsort(1)
    return torch.cat([torch.full((trajectories, 1), num_steps - 1), order[:, :draws]], 1)
