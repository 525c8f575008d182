"""Which steps are drawn: reproducible by seed and trajectory, with the distribution that each kind promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastnabla.trajectories.draws import DRAWS, draw_reverse, draw_runs, draw_stratified, draw_uniform

KINDS = pytest.mark.parametrize("kind", DRAWS)
KNOWN = {
    "stratified": [[19, 4, 5, 13, 18], [19, 4, 8, 13, 19], [19, 3, 7, 13, 15]],
    "uniform": [[19, 12, 9, 10, 2], [19, 10, 7, 4, 14], [19, 18, 11, 3, 13]],
    "runs": [[19, 0, 1, 2, 3], [19, 1, 2, 3, 4], [19, 15, 16, 17, 18]],
}

KNOWN_REVERSE = {
    False: [[1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0]],
    True: [[1] * 5, [0] * 5, [0] * 5, [0] * 5, [1] * 5],
}


@KINDS
def test_known_draws(kind):
    """A run's draws stay the same: on any platform, and with any version of NumPy."""
    assert DRAWS[kind](5, 0, 3, 20, 4).tolist() == KNOWN[kind]


def test_words_are_those_of_philox():
    """Known answer of Random123 for Philox4x64-10 with the key 0 and, since NumPy counts up first, the counter −1."""
    stream = np.random.Philox(key=[0, 0], counter=[2**64 - 1] * 4)
    assert [f"{word:016x}" for word in stream.random_raw(4)] == [
        *("16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b")
    ]


@KINDS
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**63 - 1),
    first=st.integers(0, 2**40),
    trajectories=st.integers(0, 40),
    width=st.integers(1, 30),
    draws=st.integers(1, 9),
)
def test_shape_and_range(kind, seed, first, trajectories, width, draws):
    num_steps = width * draws if kind == "stratified" else width + draws
    steps = DRAWS[kind](seed, first, trajectories, num_steps, draws)
    assert steps.dtype == torch.int64 and steps.shape == (trajectories, draws + 1)
    assert (steps[:, 0] == num_steps - 1).all()
    rest = steps[:, 1:]
    if kind == "stratified":
        assert torch.equal(rest // width, torch.arange(draws).expand_as(rest))
    else:
        assert ((rest >= 0) & (rest < num_steps - 1)).all()
        assert all(len(set(row)) == draws for row in rest.tolist())


@KINDS
def test_a_trajectorys_draws_are_its_own(kind):
    """However trajectories are split over calls; those of other seeds differ."""
    whole = DRAWS[kind](5, 100, 1000, 12, 4)
    parts = [DRAWS[kind](5, first, count, 12, 4) for first, count in ((100, 1), (101, 700), (801, 299))]
    assert torch.equal(torch.cat(parts), whole)
    others = DRAWS[kind](6, 100, 1000, 12, 4)
    assert (others[:, 1:] != whole[:, 1:]).any(1).float().mean() > 0.85


PAIRS = {"stratified": 9, "uniform": 110, "runs": 11}
"""Values that two neighbouring columns can have together, of 12 steps of which 4 are drawn."""


@pytest.mark.slow
@KINDS
def test_distribution(kind):
    """Chi-square of each column, of neighbouring columns, and correlations of trajectories 1, 2 and 64 apart.

    The seed is fixed, so there is no chance in it; p > 1e-4 in a dozen tests, and |r| < 4.5 standard deviations, are
    what a good generator passes with nearly every seed.
    """
    count, num_steps, draws = 20000, 12, 4
    rest = DRAWS[kind](11, 0, count, num_steps, draws)[:, 1:].numpy()
    for d in range(draws):
        values = np.arange(d * 3, d * 3 + 3) if kind == "stratified" else np.arange(num_steps - 1)
        assert np.isin(rest[:, d], values).all()
        assert stats.chisquare(np.bincount(rest[:, d])[values]).pvalue > 1e-4
        for lag in (1, 2, 64):
            assert abs(np.corrcoef(rest[lag:, d], rest[:-lag, d])[0, 1]) < 4.5 / math.sqrt(count)
    pairs = np.bincount(rest[:, 1] * num_steps + rest[:, 2])
    assert (pairs > 0).sum() == PAIRS[kind]
    assert stats.chisquare(pairs[pairs > 0]).pvalue > 1e-4


def test_sets_of_uniform_draws():
    """All 35 sets of 3 of 7 steps have the same probability."""
    rows = draw_uniform(3, 0, 20000, 8, 3)[:, 1:].sort(1).values.numpy()
    _, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(counts) == 35 and stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("draws", [1, 4, 9])
def test_runs_are_adjacent(draws):
    steps = draw_runs(3, 0, 200, 10, draws)
    assert ((steps[:, 2:] - steps[:, 1:-1]) % 9 == 1).all()


@pytest.mark.parametrize("draw", [draw_uniform, draw_runs])
@pytest.mark.parametrize("draws", [0, 10])
def test_as_many_as_there_are(draw, draws):
    with pytest.raises(ValueError, match=rf"draws = {draws}: must be between 1 and 9"):
        draw(0, 0, 1, 10, draws)


@pytest.mark.parametrize("strata", [0, -2, 3, 20])
def test_strata_divide_the_steps(strata):
    with pytest.raises(ValueError, match=rf"strata = {strata}: must be at least 1 and divide the number of steps, 10"):
        draw_stratified(0, 0, 1, 10, strata)


@pytest.mark.parametrize("whole", [False, True])
def test_known_reverse_draws(whole):
    drawn = draw_reverse(5, 0, 5, 5, 0.3, whole) > 0
    assert drawn.int().tolist() == KNOWN_REVERSE[whole]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**63 - 1),
    trajectories=st.integers(1, 30),
    inner=st.integers(1, 9),
    fraction=st.floats(0.01, 1),
    whole=st.booleans(),
)
def test_reverse_draws_are_even(seed, trajectories, inner, fraction, whole):
    """Of each trajectory, or of all trajectories, the fraction is drawn, rounded up or down."""
    drawn = draw_reverse(seed, 3, trajectories, inner, fraction, whole) > 0
    counts = drawn[:, 0].sum()[None] if whole else drawn.sum(1)
    expected = fraction * (trajectories if whole else inner)
    assert ((counts - expected).abs() < 1 + 1e-9).all()
    if whole:
        assert (drawn == drawn[:, :1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.5])
def test_every_transition_has_the_same_probability_of_a_reverse_residual(fraction):
    """20,000 trajectories: the mean factor of a place is within 4.5 standard deviations of 1. So are those of 3,000 draws of
    whole trajectories."""
    one = draw_reverse(7, 0, 20000, 5, fraction, whole=False)
    all_ = torch.stack([draw_reverse(7, first, 5, 1, fraction, whole=True)[:, 0] for first in range(3000)])
    for factors in (one, all_):
        deviation = math.sqrt((1 / fraction - 1) / len(factors))
        assert ((factors.double().mean(0) - 1).abs() < 4.5 * deviation).all()
        assert factors.unique().tolist() == pytest.approx([0, 1 / fraction])
