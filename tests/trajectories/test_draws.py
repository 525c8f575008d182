"""Runs of adjacent steps; the other draws are tested with the buffer's operations."""

import pytest
import torch

from fastnabla.trajectories.draws import DRAWS, draw_runs


@pytest.mark.parametrize("draws", [1, 4, 9])
def test_runs_are_adjacent(draws):
    steps = draw_runs(3, 0, 200, 10, draws)
    assert steps.shape == (200, draws + 1)
    assert (steps[:, 0] == 9).all()
    assert ((steps[:, 1:] >= 0) & (steps[:, 1:] < 9)).all()
    assert ((steps[:, 2:] - steps[:, 1:-1]) % 9 == 1).all()


def test_every_step_before_the_last_is_as_likely():
    trajectories, draws = 20_000, 4
    counts = draw_runs(0, 0, trajectories, 11, draws)[:, 1:].flatten().bincount(minlength=10)
    # Starts are multinomial; a step is in the run of `draws` of the 10 starts, so its count has at most this deviation.
    deviation = (trajectories * draws / 10 * (1 - draws / 10)) ** 0.5
    assert (counts - trajectories * draws / 10).abs().max() < 4.5 * deviation


@pytest.mark.parametrize("kind", DRAWS)
def test_a_trajectory_draws_by_its_number(kind):
    whole = DRAWS[kind](5, 0, 12, 20, 4)
    assert torch.equal(DRAWS[kind](5, 7, 5, 20, 4), whole[7:])
    assert not torch.equal(DRAWS[kind](6, 0, 12, 20, 4), whole)


@pytest.mark.parametrize("draws", [0, 10])
def test_as_many_as_there_are(draws):
    with pytest.raises(ValueError, match="must be between 1 and 9"):
        draw_runs(0, 0, 1, 10, draws)
