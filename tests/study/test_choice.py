"""Choosing learning rates."""

import pytest

from fastnabla.study.choice import choose, chosen_settings, is_at_the_edge, tuned
from fastnabla.study.plan import Setting
from fastnabla.study.protocol import Contender

LOW, MIDDLE, HIGH = (Setting("ours", rate) for rate in (1e-3, 3e-3, 1e-2))
RESULTS = [
    tuned(LOW, [(0.1, 0.00), (0.3, 0.02)]),
    tuned(MIDDLE, [(0.5, 0.04), (0.7, 0.08)]),
    tuned(HIGH, [(0.9, 0.30), (1.1, 0.20)]),
]


def test_gains_and_losses_are_means_over_seeds():
    assert (RESULTS[1].gain, RESULTS[1].loss, RESULTS[1].seeds) == (pytest.approx(0.6), pytest.approx(0.06), 2)


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
    assert chosen_settings(methods, results, [0.05, 0.3]) == [LOW, other, HIGH]


def test_a_single_learning_rate_is_no_choice_and_an_untuned_method_is_left_out():
    methods = [contender("ours", 1e-2), contender("theirs", 1e-3, 1e-2)]
    assert chosen_settings(methods, {}, [0.05, 0.3]) == [HIGH]


def test_edges_of_the_grid():
    method = contender("ours", 1e-3, 3e-3, 1e-2)
    assert [is_at_the_edge(setting, method) for setting in (LOW, MIDDLE, HIGH)] == [True, False, True]
    assert not is_at_the_edge(HIGH, contender("ours", 1e-2))
