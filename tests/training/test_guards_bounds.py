"""Bounds on what a run may lose, and how a run ends that passes one."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastnabla import train
from fastnabla.config.training_sections import EvaluationConfig
from fastnabla.training.guards import BoundPassed, passed_bound, require_measurable
from fastnabla.training.trainer import Trainer
from tests.faults import assert_same_result
from tests.integration.test_cli import QUICK

BOTH = EvaluationConfig(probe="testbed", stop_below_diversity=0.5, stop_above_prior=3.0)
RUN = [*QUICK, "--updates=2", "--rollout.updates=1", "--evaluation.every=1"]


def records(*values: tuple[float | None, float | None]) -> list[dict]:
    """Evaluations with these pairwise distances and distances from the prior, and training between them."""
    evaluations = [
        {"phase": "evaluate", "update": 2 * i, "pairwise_distance": distance, "prior_distance": prior}
        for i, (distance, prior) in enumerate(values)
    ]
    return [record for e in evaluations for record in (e, {"phase": "train", "update": e["update"] + 1})]


@pytest.mark.parametrize(
    ("values", "passed"),
    [
        ([(2.0, 1.0)], None),
        ([(2.0, 1.0), (1.0, 3.0)], None),  # on the bounds
        ([(2.0, 1.0), (0.999, 1.0)], "stop_below_diversity = 0.5 is passed after update 2: pairwise_distance is 0.999"),
        (
            [(2.0, 1.0), (2.0, 3.01)],
            "stop_above_prior = 3 is passed after update 2: prior_distance is 3.01, 3.01 times",
        ),
        ([(2.0, 1.0), (0.5, 9.0), (2.0, 1.0)], None),  # only the newest counts
        ([(2.0, 1.0), (None, 1.0)], "stop_below_diversity"),
        ([(2.0, None), (2.0, 1.0)], "stop_above_prior"),
        ([(0.0, 1.0), (0.0, 1.0)], None),  # nothing was there to lose
        ([(2.0, 0.0), (2.0, 0.1)], "stop_above_prior"),
    ],
)
def test_what_counts_as_passed(values: list, passed: str | None) -> None:
    for order in (records(*values), records(*values)[::-1]):
        found = passed_bound(BOTH, order)
        assert found is None if passed is None else passed in found
    assert passed_bound(EvaluationConfig(probe="testbed"), records(*values)) is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stop_below_diversity": 1.0}, "stop_below_diversity"),
        ({"stop_below_diversity": 0.0}, "stop_below_diversity"),
        ({"stop_above_prior": 1.0}, "stop_above_prior"),
        ({"stop_above_prior": float("inf")}, "stop_above_prior"),
        ({"stop_above_prior": float("nan")}, "stop_above_prior"),
        ({"probe": "none", "stop_below_diversity": 0.5}, "stop_below_diversity"),
        ({"probe": "none", "stop_above_prior": 2.0}, "stop_above_prior"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(changes: dict, field: str) -> None:
    with pytest.raises(ValueError, match=f"evaluation.{field} = "):
        dataclasses.replace(EvaluationConfig(probe="testbed"), **changes)


def test_a_probe_without_features_has_no_distance_from_the_prior() -> None:
    class Compares:
        distance = staticmethod(lambda images, others: images)

    require_measurable(dataclasses.replace(BOTH, stop_above_prior=None), Compares())
    with pytest.raises(ValueError, match="stop_above_prior"):
        require_measurable(BOTH, Compares())


@pytest.mark.slow
def test_a_run_that_passes_a_bound_ends_and_can_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The metric is what a finetuned model would have to have; all else is a run of the testbed."""
    option, metric, value = "--evaluation.stop-above-prior=1.001", "prior_distance", 10.0
    monkeypatch.chdir(tmp_path)
    evaluate = Trainer.evaluate

    def lossy(self):
        measure = self.evaluator.measure
        self.evaluator.measure = lambda images: measure(images) | {metric: self.tracker.records[0][metric] * value}
        evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", lossy)
    assert train.main([*RUN, "--run=whole"]) == 0
    assert train.main([*RUN, "--run=run", option]) == BoundPassed.STATUS == 3
    message = " ".join(capsys.readouterr().err.split())
    field = option.removeprefix("--").partition("=")[0].replace("-", "_")
    assert f"{field} = " in message and "after update 1" in message and "--resume run" in message
    run = Path("run")
    assert (run / "samples" / "update-0001.png").is_file() and (run / "table.md").is_file()
    assert (run / "checkpoints" / "update-000001").is_dir()
    assert train.main(["--resume", "run"]) == BoundPassed.STATUS  # nothing has changed
    values = json.loads((run / "config.json").read_text())
    values["evaluation"][field.partition(".")[2]] = None
    (run / "config.json").write_text(json.dumps(values))
    assert train.main(["--resume", "run"]) == 0
    assert_same_result(run, Path("whole"))
