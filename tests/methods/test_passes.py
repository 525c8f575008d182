"""The table of passes in `fastnabla.methods.passes` is what is planned, and what the step counts."""

import functools

import pytest

from fastnabla.methods import passes
from fastnabla.methods.passes import planned_decodes, planned_passes
from tests.golden import STEP_SETS, load_step
from tests.methods.test_sharing import batch as adjacent

GOLDEN = next(folder for folder in STEP_SETS if (folder / "flow").exists())
load_once = functools.cache(load_step)
LENGTH = 2
"""L of `adjacent`: of six inner transitions, three have a next state in which another one starts."""
COLUMNS = {
    "reverse": {},
    "forward": {"reverse_weight": 0.0},
    "second order": {"reverse_second_order": True},
    "reverse, reused": {},
    "forward, reused": {"reverse_weight": 0.0},
}


def table() -> dict[tuple[str, str], float]:
    """U per inner transition in the docstring, by reward gradient and column."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in passes.__doc__.splitlines()]
    header = next(cells for cells in lines if cells[0] == "reward_gradient")
    found = {}
    for cells in lines:
        if cells[0].startswith('"'):
            for column, cell in zip(header[1:], cells[1:], strict=True):
                whole, _, part = cell.partition("+")
                found[cells[0].strip('"'), column] = int(whole) + (int(part.split("/")[0]) / LENGTH if part else 0)
    return found


def test_the_table_is_complete():
    assert table().keys() == {
        (reward_gradient, column)
        for reward_gradient in ("lookahead", "lookahead_detached", "terminal")
        for column in COLUMNS
    }


@pytest.mark.parametrize("noising", [False, True], ids=["residual", "plain"])
@pytest.mark.parametrize(("cell", "expected"), table().items(), ids=str)
def test_passes(cell, expected, noising):
    reward_gradient, column = cell
    golden, reused = load_once(GOLDEN), "reused" in column
    settings = COLUMNS[column] | {"reward_gradient": reward_gradient}
    step = golden.step(100, reuse_passes=reused, noising=noising, **settings)
    inner = expected - noising * (1 if "forward" in column else 2)
    run = LENGTH if reused else 1
    assert planned_passes(step.objective, True, run, noising=noising) == (inner, 3 - noising)
    report = step(adjacent(golden) if reused else golden.transitions)
    assert report.passes == pytest.approx({"inner": inner, "last": 3 - noising})
    if not noising:
        assert planned_passes(step.objective, True, run, cached=True) == planned_passes(
            step.objective, True, run, noising=True
        )


@pytest.mark.parametrize(
    ("reward_gradient", "reverse_weight", "run", "decodes"),
    [
        ("lookahead", 1.0, 1, 2),
        ("lookahead", 0.0, 1, 1),
        ("lookahead_detached", 1.0, LENGTH, 1 + 1 / LENGTH),
        ("lookahead", 0.0, LENGTH, 1),
        ("terminal", 1.0, 1, 0),
    ],
)
def test_decodes(reward_gradient, reverse_weight, run, decodes):
    """As the docstring says; `test_sharing` counts them."""
    golden = load_once(GOLDEN)
    step = golden.step(4, reward_gradient=reward_gradient, reverse_weight=reverse_weight)
    assert planned_decodes(step.objective, True, run) == (decodes, 1)
