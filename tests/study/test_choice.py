"""Choosing learning rates."""

import math

import pytest

from fastnabla.study.choice import choose, chosen_settings, is_at_the_edge, loss_error, tuned
from fastnabla.study.plan import Setting
from fastnabla.study.protocol import Contender

LOW, MIDDLE, HIGH = (Setting("ours", rate) for rate in (1e-3, 3e-3, 1e-2))
RESULTS = [
    tuned(LOW, [(0.1, 0.00), (0.3, 0.02)]),
    tuned(MIDDLE, [(0.5, 0.04), (0.7, 0.08)]),
    tuned(HIGH, [(0.9, 0.30), (1.1, 0.20)]),
]


def test_gains_and_losses_are_means_over_seeds():
    assert (RESULTS[1].gain, RESULTS[1].loss) == (pytest.approx(0.6), pytest.approx(0.06))


def test_the_error_of_a_mean_loss_is_pooled():
    """Two losses of difference d have the variance d² / 2, and their mean half of it."""
    one_seed = tuned(HIGH, [(1.0, 5.0)])
    assert loss_error([RESULTS[1]]) == pytest.approx(0.02)
    assert loss_error([*RESULTS, one_seed]) == pytest.approx(math.sqrt((0.02**2 + 0.04**2 + 0.1**2) / 3 / 4))
    assert math.isnan(loss_error([one_seed]))


@pytest.mark.parametrize(("allowed", "setting"), [(0.05, LOW), (0.06 + 1e-9, MIDDLE), (0.24, MIDDLE), (0.3, HIGH)])
def test_the_highest_gain_within_the_allowed_loss_is_chosen(allowed: float, setting: Setting):
    assert choose(RESULTS, allowed).setting == setting


def test_the_least_loss_is_chosen_if_all_lose_more():
    assert choose(RESULTS, 0.0).setting == LOW
    assert choose(RESULTS[1:], 0.0).setting == MIDDLE


def test_a_learning_rate_that_diverged_is_chosen_only_if_there_is_no_other():
    diverged = tuned(HIGH, [(2.0, 0.0)], diverged=1)
    assert choose([*RESULTS[:2], diverged], 0.5).setting == MIDDLE
    assert choose([diverged], 0.5).setting == HIGH


def contender(name: str, *rates: float) -> Contender:
    return Contender(name=name, method="draft", learning_rates=rates)


def test_a_setting_is_chosen_once_and_by_allowed_loss_first():
    methods = [contender("ours", 1e-3, 3e-3, 1e-2), contender("theirs", 1e-3, 1e-2)]
    other = Setting("theirs", 1e-3)
    results = {"ours": RESULTS, "theirs": [tuned(other, [(1.0, 0.0)])]}
    chosen = chosen_settings(methods, results, [0.05, 0.3])
    assert list(chosen.items()) == [(LOW, ["5%"]), (other, ["5%", "30%"]), (HIGH, ["30%"])]


def test_a_setting_that_loses_more_than_allowed_is_named():
    chosen = chosen_settings([contender("ours", 3e-3, 1e-2)], {"ours": RESULTS[1:]}, [0.05, 0.1])
    assert chosen == {MIDDLE: ["5% (least loss)", "10%"]}


def test_a_single_learning_rate_is_no_choice_and_an_untuned_method_is_left_out():
    methods = [contender("ours", 1e-2), contender("theirs", 1e-3, 1e-2)]
    assert chosen_settings(methods, {}, [0.05, 0.3]) == {HIGH: ["not tuned"]}


def test_edges_of_the_grid():
    method = contender("ours", 1e-3, 3e-3, 1e-2)
    assert [is_at_the_edge(setting, method) for setting in (LOW, MIDDLE, HIGH)] == [True, False, True]
    assert not is_at_the_edge(HIGH, contender("ours", 1e-2))
