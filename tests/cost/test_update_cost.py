"""The cost that is printed before a run."""

import pytest

from fastnabla.cost.update_cost import duration
from fastnabla.methods.passes import planned_decodes, planned_passes
from fastnabla.objective.settings import Objective


@pytest.mark.parametrize(
    ("settings", "with_flow", "passes", "decodes"),
    [
        ({}, True, (7, 3), (2, 1)),
        ({"reverse_weight": 0.0}, True, (5, 3), (1, 1)),
        ({}, False, (5, 3), (1, 1)),
        ({"reward_gradient": "lookahead_detached"}, True, (6, 3), (2, 1)),
        ({"reward_gradient": "terminal"}, True, (5, 3), (0, 1)),
        ({"reward_gradient": "terminal", "reverse_weight": 0.0}, True, (3, 3), (0, 1)),
    ],
)
def test_plan(settings: dict, with_flow: bool, passes: tuple[int, int], decodes: tuple[int, int]) -> None:
    assert planned_passes(Objective(**settings), with_flow) == passes
    assert planned_decodes(Objective(**settings), with_flow) == decodes


@pytest.mark.parametrize("run", [2, 4])
@pytest.mark.parametrize(
    ("settings", "with_flow", "each", "tail", "decodes"),
    [
        ({}, True, 6, 2, 1),
        ({"reverse_weight": 0.0}, True, 4, 2, 0),
        ({}, False, 4, 2, 0),
        ({"reward_gradient": "lookahead_detached"}, True, 5, 1, 1),
        ({"reward_gradient": "lookahead_detached", "reverse_weight": 0.0}, True, 3, 1, 0),
    ],
)
def test_plan_of_runs(settings: dict, with_flow: bool, each: int, tail: int, decodes: int, run: int) -> None:
    """(6 L + 2) / L passes and (L + 1) / L decodes with look-ahead, and so on; a run in two parts has two tails."""
    objective = Objective(**settings)
    for tails in (1, 2)[: run // 2]:
        assert planned_passes(objective, with_flow, run, tails) == ((each * run + tail * tails) / run, 3)
        assert planned_decodes(objective, with_flow, run, tails) == ((run + decodes * tails) / run, 1)


def test_plan_of_runs_with_terminal_guidance() -> None:
    assert planned_passes(Objective(reward_gradient="terminal"), True, 4, 1) == (5, 3)
    assert planned_decodes(Objective(reward_gradient="terminal"), True, 4, 1) == (0, 1)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.25, "0.2 s"), (119, "119.0 s"), (120, "2.0 min"), (9000, "2.5 h"), (272_326, "3.2 d")]
)
def test_duration_is_in_the_unit_that_suits(seconds: float, words: str) -> None:
    assert duration(seconds) == words
