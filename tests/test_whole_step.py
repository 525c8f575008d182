"""The benchmark of a whole step runs at toy size, and its table says what it should."""

import json
from pathlib import Path

import pytest

from bench.whole_step import HEADER, main, markdown


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path: Path = tmp_path_factory.mktemp("bench") / "step.json"
    options = ["--model", "toy", "--device", "cpu", "--no-compile", "--budget-seconds", "60", "--rounds", "1"]
    main([*options, "--transitions", "6", "--json", str(path)])
    return json.loads(path.read_text())


def test_gradients_were_compared(result: dict) -> None:
    assert {"published", "fastnabla: fewer passes", "these, draw=runs"} <= result["gradient difference"].keys()
    assert max(result["gradient difference"].values()) < 1e-3


def test_rows_have_the_passes_of_the_plan(result: dict) -> None:
    rows = {row["name"]: row for row in result["tables"][0]}
    assert all("note" not in row for row in rows.values())
    assert rows["published"]["U"] == 8
    assert rows["these, guidance=terminal"]["U"] < rows["these, guidance=lookahead_detached"]["U"]
    assert rows["fastnabla: fewer passes"]["U"] == pytest.approx(rows["+ decoder keeping less"]["U"])
    assert all(row["s"] > 0 and row["peak GiB"] > 0 for row in rows.values())


def test_markdown_has_all_columns(result: dict) -> None:
    assert f"| {' | '.join(HEADER)} |" in markdown(result)
