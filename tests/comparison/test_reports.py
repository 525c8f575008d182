"""Pages of comparisons from run folders that are made up. Nothing is trained."""

import json
from pathlib import Path

import pytest

from fastnabla.comparison.plan import LAST_FILE, Plan, PlannedRun, make_plan
from fastnabla.comparison.report import Report
from fastnabla.config.train import to_json
from fastnabla.prompts import RunPrompts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("drawn")]


def planned(folder: Path, **changes) -> Plan:
    """Two methods, two updates each."""
    return make_plan("testbed", ["residual-db", "draft"], folder=folder, **{"seeds": 1, "updates": 2, **changes})


ROWS = {"rows_trajectory": 2, "passes_trajectory": 5.0, "rows_inner": 2, "passes_inner": 7.0, "rows_last": 0}
"""What an update's record has of its cost, for either method."""


def make_up(run: PlannedRun, *evaluations: dict[str, float | None]) -> None:
    """Make up the folder of a run with these `evaluations`, one after each update from 0 on. Each update takes two seconds."""
    metrics, timing = [], []
    for update, values in enumerate(evaluations):
        for phase, own in (("train", ROWS), ("evaluate", values)) if update else (("evaluate", values),):
            metrics.append({"phase": phase, "update": update, **own})
            timing.append({"phase": phase, "update": update, "seconds": 2.0 * update})
    (run.folder / "samples").mkdir(parents=True)
    for name, lines in (("metrics.jsonl", metrics), ("timing.jsonl", timing)):
        (run.folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "config.json").write_text(to_json(run.config))
    (run.folder / LAST_FILE).write_text("")
    RunPrompts(texts=["a cow"], trained=1, evaluated=range(1)).save(run.folder / "prompts.json")
    for number in range(len(evaluations)):
        (run.folder / "samples" / f"update-{number:04d}.png").write_bytes(b"\x89PNG")


def test_metrics_that_are_not_finite_are_named_and_left_out(tmp_path: Path) -> None:
    """The second run's pairwise distance is null after its first update, and so is its reward in the end."""
    plan = planned(tmp_path)
    start = {"reward": 1.0, "pairwise_distance": 2.0}
    make_up(plan.runs[0], start, start | {"reward": 3.0}, start | {"reward": 4.0})
    make_up(plan.runs[1], start, *({"reward": reward, "pairwise_distance": None} for reward in (5.0, None)))
    report = Report.read(plan, plan.runs, {})
    report.write(tmp_path)
    final, matched = report.sheets()
    assert final.columns[:3] == ["method", "reward", "pairwise_distance"]
    assert [row[:3] for row in final.rows] == [
        ("pretrained", "1", "2"), ("residual-db", "4", "2"), ("draft", "not finite", "not finite"),
    ]  # fmt: skip
    assert matched.title.endswith(", 4") and [row[1] for row in matched.rows] == ["1", "4", "5"]
    assert "not finite" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
    values = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert values["points"][-1]["metrics"] == {"reward": None, "pairwise_distance": None}


def test_seeds_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    plan = planned(tmp_path, seeds=2)
    for run, reward in zip(plan.runs, (4.0, 5.0, 6.0, None), strict=True):
        make_up(run, {"reward": 1.0}, {"reward": reward}, {"reward": reward})
    report = Report.read(plan, plan.runs, {})
    report.write(tmp_path)
    final, matched = report.sheets()
    assert [row[1] for row in final.rows] == ["1", "5 [4, 6]", "5, 1 not finite"]
    assert matched.title.endswith(", 5 [4, 6]") and [row[1] for row in matched.rows] == ["1", "5 [4, 6]", "5"]


def test_a_method_without_a_finite_reward_is_not_compared_at_equal_reward(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    for run in plan.runs:
        make_up(run, {"reward": 1.0}, {"reward": None}, {"reward": None})
    report = Report.read(plan, plan.runs, {})
    report.write(tmp_path)
    assert [row[0] for row in report.sheets()[1].rows] == ["pretrained"]


def test_lost_durations_are_named(tmp_path: Path) -> None:
    """After a crash, the last lines of the first run's timing.jsonl are lost, but for one that is damaged."""
    plan, start = planned(tmp_path), {"reward": 1.0}
    for run in plan.runs:
        make_up(run, start, start, start)
    timing = plan.runs[0].folder / "timing.jsonl"
    timing.write_text("\n".join([*timing.read_text().splitlines()[:3], "\0" * 40]))
    report = Report.read(plan, plan.runs, {})
    assert report.remarks == [
        "residual-db-seed-0: its timing.jsonl lacks 1 of its updates, so its seconds may be too few."
    ]
    assert [(p.seconds, p.untimed) for p in report.points] == [(0, 0), (2, 0), (2, 1), (0, 0), (2, 0), (4, 0)]
    timing.unlink()
    assert Report.read(plan, plan.runs, {}).points[2].untimed == 2
