"""The cost that is printed before a run."""

import pytest

from fastnabla.cost import planned_decodes, planned_passes
from fastnabla.objective.residual_db import Objective


@pytest.mark.parametrize(
    ("settings", "with_flow", "passes", "decodes"),
    [
        ({}, True, (7, 3), (2, 1)),
        ({"reverse": 0.0}, True, (5, 3), (1, 1)),
        ({}, False, (5, 3), (1, 1)),
        ({"guidance": "lookahead_detached"}, True, (6, 3), (2, 1)),
        ({"guidance": "terminal"}, True, (5, 3), (0, 1)),
        ({"guidance": "terminal", "reverse": 0.0}, True, (3, 3), (0, 1)),
    ],
)
def test_plan(settings: dict, with_flow: bool, passes: tuple[int, int], decodes: tuple[int, int]) -> None:
    assert planned_passes(Objective(**settings), with_flow) == passes
    assert planned_decodes(Objective(**settings), with_flow) == decodes
