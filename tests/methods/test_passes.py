"""The tables of passes in `fastnabla.methods.passes` are what is planned, and what the step counts."""

import itertools

import pytest

from fastnabla.methods import passes
from fastnabla.methods.passes import planned_decodes, planned_passes
from tests.methods.test_sharing import batch as adjacent
from tests.small_step import shared_step

LENGTH = 2
"""L of `adjacent`: of six inner transitions, three have a next state in which another one starts."""
REWARD_GRADIENTS = ("lookahead", "lookahead_detached", "terminal")
COLUMNS = {
    "reverse": {},
    "forward": {"reverse_weight": 0.0},
    "second order": {"reverse_second_order": True},
    "reference": {"reverse_target": "reference"},
}


def table(heading: str) -> dict[tuple[str, str], float]:
    """U per transition in the table of the docstring that begins with `heading`, by row and column."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in passes.__doc__.splitlines()]
    start = next(i for i, cells in enumerate(lines) if cells[0] == heading)
    found = {}
    for name, *values in itertools.takewhile(lambda cells: len(cells) > 1, lines[start + 2 :]):
        for column, cell in zip(lines[start][1:], values, strict=True):
            whole, _, part = cell.partition("+")
            found[name.strip('"'), column] = int(whole) + (int(part.split("/")[0]) / LENGTH if part else 0)
    return found


PASSES, REUSED = table("inner transition"), table("reused, inner")
LAST = {column: PASSES.pop(("last transition", column)) for column in COLUMNS}


def test_the_tables_are_complete():
    assert PASSES.keys() == REUSED.keys() == set(itertools.product(REWARD_GRADIENTS, COLUMNS))


@pytest.mark.parametrize("reused", [False, True], ids=["apart", "reused"])
@pytest.mark.parametrize(
    ("method", "reward_gradient", "column"),
    [("residual-db", *cell) for cell in PASSES] + [("db", *cell) for cell in PASSES if cell[1] != "reference"],
)
def test_passes(method, reward_gradient, column, reused):
    noising = method == "db"
    golden = shared_step()
    settings = COLUMNS[column] | {"reward_gradient": reward_gradient}
    step = golden.step(100, reuse_passes=reused, noising=noising, **settings)
    inner = (REUSED if reused else PASSES)[reward_gradient, column] - noising * (1 if column == "forward" else 2)
    last, run = LAST[column] - noising, LENGTH if reused else 1
    assert planned_passes(step.objective, True, run, noising=noising) == (inner, last)
    report = step(adjacent(golden) if reused else golden.transitions)
    assert report.passes == pytest.approx({"inner": inner, "last": last})
    if not noising:
        later = planned_passes(step.objective, True, run, cached=True)
        same = column == "reference"
        assert later == ((inner, last) if same else planned_passes(step.objective, True, run, noising=True))


@pytest.mark.parametrize(
    ("reward_gradient", "column", "run", "decodes"),
    [
        ("lookahead", "reverse", 1, (2, 1)),
        ("lookahead", "forward", 1, (1, 1)),
        ("lookahead_detached", "reverse", LENGTH, (1 + 1 / LENGTH, 1)),
        ("lookahead", "forward", LENGTH, (1, 1)),
        ("terminal", "reverse", 1, (0, 1)),
        ("lookahead", "reference", 1, (2, 2)),
        ("lookahead_detached", "reference", LENGTH, (1 + 1 / LENGTH, 2)),
        ("terminal", "reference", 1, (0, 1)),
    ],
)
def test_decodes(reward_gradient, column, run, decodes):
    """As the docstring says; `test_sharing` and `test_reference_target` count them."""
    step = shared_step().step(4, reward_gradient=reward_gradient, **COLUMNS[column])
    assert planned_decodes(step.objective, True, run) == decodes
