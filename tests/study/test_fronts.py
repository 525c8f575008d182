"""Places along the scale of the LoRA."""

import math

import pytest

from fastnabla.study.fronts import Place, place_at
from tests.study.made_up import path_of


def test_measures_are_interpolated_where_the_gain_is_reached():
    place = place_at(path_of(gain=1.0, loss=0.4), 0.8)
    assert place.scale == pytest.approx(0.8)
    assert place.measures["reward"] == pytest.approx(1.8)
    assert place.measures["hue_entropy"] == pytest.approx(1 - 0.4 * 0.8)


@pytest.mark.parametrize(("gain", "reached"), [(0.5, True), (1.5, True), (1.5001, False)])
def test_a_gain_is_reached_up_to_the_largest_scale(gain: float, reached: bool):
    assert (place_at(path_of(gain=1.0, loss=0.4), gain) is not None) == reached


def test_the_first_crossing_counts_where_the_reward_falls_again():
    rewards = [(0.0, 0.0), (0.5, 1.0), (1.0, 0.2), (1.5, 2.0)]
    path = [Place(scale, {"reward": reward}) for scale, reward in rewards]
    for gain, low, high in ((0.6, 0.0, 0.5), (1.5, 1.0, 1.5)):
        place = place_at(path, gain)
        assert low < place.scale < high
        assert place.measures["reward"] == pytest.approx(gain)


def test_a_gain_that_ends_the_path_is_reached_at_its_end():
    """Monotone cubics round there: these end below the last reward."""
    rewards = [0.513519, 0.581148, 0.681701, 0.802544, 0.985085, 1.090976]
    path = [
        Place(scale, {"reward": reward}) for scale, reward in zip([0, 0.25, 0.5, 0.75, 1, 1.5], rewards, strict=True)
    ]
    place = place_at(path, rewards[-1] - rewards[0])
    assert place.scale == 1.5 and place.measures["reward"] == pytest.approx(rewards[-1])


def test_what_is_not_finite_elsewhere_does_not_matter():
    """At scale 1.5 everything is nan, and one measure at 0.5."""
    nan = math.nan
    table = {"reward": [0.0, 0.5, 1.0, nan], "kept": [0.0, 1.0, 2.0, nan], "lost": [0.0, nan, 1.0, nan]}
    path = [
        Place(scale, {name: column[row] for name, column in table.items()})
        for row, scale in enumerate([0.0, 0.5, 1.0, 1.5])
    ]
    place = place_at(path, 0.75)
    assert place.scale == pytest.approx(0.75) and place.measures["kept"] == pytest.approx(1.5)
    assert math.isnan(place.measures["lost"])
    assert place_at(path, 1.5) is None


@pytest.mark.parametrize("gain", [0.2, 0.6, 0.9, 1.2])
def test_a_quadratic_loss_is_interpolated_better_than_by_chords(gain: float):
    path = [Place(scale, {"reward": scale, "loss": scale**2}) for scale in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)]
    before = max(place.scale for place in path if place.scale < gain)
    after = min(place.scale for place in path if place.scale >= gain)
    chord = (gain - before) * (after - gain)  # the error of a chord of a square
    assert abs(place_at(path, gain).measures["loss"] - gain**2) < 0.5 * chord
