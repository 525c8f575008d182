"""Which stored results of `fastnabla.evaluate` a comparison uses. Nothing is trained or measured."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastnabla.comparison.evaluations import stored_evaluation
from fastnabla.evaluation.options import FORMAT, EvaluationOptions, file_of


def evaluated(run: Path, *rewards: float) -> None:
    """Record evaluations with these rewards, one after each update from 0 on."""
    records = [{"phase": "evaluate", "update": n, "reward": reward} for n, reward in enumerate(rewards)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def store(run: Path, options: EvaluationOptions, **values: int) -> dict:
    """Store results, without numbers."""
    result = {**values, "settings": {**dataclasses.asdict(options), "format": FORMAT}, "groups": {}}
    (run / file_of(options)).write_text(json.dumps(result))
    return result


@pytest.mark.parametrize("weights", ["raw", "ema", "best"])
def test_results_of_the_same_weights_are_used(weights: str, tmp_path: Path) -> None:
    options = EvaluationOptions(weights=weights)
    evaluated(tmp_path, 9.0, 1.0, 3.0)
    assert stored_evaluation(tmp_path, options) is None
    result = store(tmp_path, options, update=2)
    assert stored_evaluation(tmp_path, options) == result
    evaluated(tmp_path, 9.0, 1.0, 3.0, 2.0)  # trained on: the best weights are the same
    assert (stored_evaluation(tmp_path, options) == result) == (weights == "best")
    assert stored_evaluation(tmp_path, EvaluationOptions(weights="ema" if weights == "raw" else "raw")) is None


def test_results_of_an_older_version_are_used(tmp_path: Path) -> None:
    evaluated(tmp_path, 9.0, 1.0)
    result = store(tmp_path, EvaluationOptions())
    assert stored_evaluation(tmp_path, EvaluationOptions()) == result


@pytest.mark.parametrize("damaged", ["", '{"settings": ', "{}", "[]", '{"settings": 1}'])
def test_a_damaged_file_is_named(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(damaged)
    with pytest.raises(
        ValueError, match=r"evaluation\.json' is damaged \(\w+: .*\); remove it to measure the run again"
    ):
        stored_evaluation(tmp_path, EvaluationOptions())
