"""Runs of a comparison that stop at a bound of their evaluation."""

import json
from pathlib import Path

import pytest

from fastnabla import compare
from fastnabla.training.trainer import Trainer
from tests.comparison.test_compare import _no_pictures, command, values

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stops_at", [4, 8], ids=["half-way", "at the end"])
def test_a_run_that_stopped_at_a_bound_goes_on_once_it_is_loosened(
    stops_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DRaFT's eight updates are evaluated after four and eight. The distance from the prior is made up."""
    folder, evaluate, evaluated = tmp_path / "bounded", Trainer.evaluate, []

    def lossy(self) -> None:
        measure, distance = self.evaluator.measure, self.tracker.records[0]["prior_distance"]
        lost = {"prior_distance": distance * (10 if self.done >= stops_at else 1)}
        self.evaluator.measure = lambda images: measure(images) | lost
        evaluate(self)
        self.evaluator.measure = measure
        evaluated.append(self.done)

    monkeypatch.setattr(Trainer, "evaluate", lossy)
    monkeypatch.setattr(Trainer, "_write_pictures", _no_pictures)
    arguments = [*command(folder), "evaluation.stop-above-prior=3", "--methods", "draft"]
    for _ in range(2):
        assert compare.main(arguments) == 0
        (remark,) = values(folder)["remarks"]
        assert remark.startswith(
            f"draft-seed-0 ended early; evaluation.stop_above_prior = 3 is passed after update {stops_at}"
        )
    configuration = folder / "draft-seed-0" / "config.json"
    own = json.loads(configuration.read_text())
    own["evaluation"]["stop_above_prior"] = None
    configuration.write_text(json.dumps(own))
    assert compare.main(arguments) == 0
    assert evaluated == [4, 8]
    assert values(folder)["remarks"] == [] and values(folder)["points"][-1]["update"] == 8
