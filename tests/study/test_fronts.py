"""Places along the scale of the LoRA."""

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
    assert place_at(path, 0.6).scale == pytest.approx(0.3)
    assert place_at(path, 1.5).scale == pytest.approx(1.0 + 0.5 * 1.3 / 1.8)
