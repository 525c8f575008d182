"""Spikes of loss and gradient norms: what counts as one, what is said of it, and that resuming does not forget."""

import dataclasses
import math
import statistics
from pathlib import Path

import pytest
import torch

from fastnabla.training import guards
from fastnabla.training.guards import MIN_HISTORY, WINDOW, Guard, median_of
from fastnabla.training.trainer import Trainer
from tests.faults import tiny
from tests.runs import interrupt, without_pictures
from tests.training.test_guards import PROMPTS, TIMESTEP, records, report


def history(values: list[float | None], name: str = "loss") -> list[dict]:
    return [{"phase": "train", "update": i, name: value} for i, value in enumerate(values, 1)]


def guard(factor: float | None) -> Guard:
    return Guard(PROMPTS, TIMESTEP, max_skipped=3, spike_factor=factor)


def told(value: float, past: list[dict], factor: float | None = 10.0, name: str = "loss", **rows: float) -> int:
    watched = report()
    for statistic, number in rows.items():
        watched.rows[statistic][1] = number
    return guard(factor).count_spikes(99, {name: value}, past, watched)


def test_usual_is_the_median_of_the_last_finite_training_values() -> None:
    values = [float(7 * i % 97) * (-1) ** i for i in range(120)]
    past = history(values)
    past.insert(115, {"phase": "evaluate", "update": 115, "loss": 1e9})
    past.append({"phase": "train", "update": 121, "loss": None})
    assert median_of(past, "loss") == statistics.median(abs(v) for v in values[-(WINDOW - 1) :])
    assert median_of(past, "grad_norm_lora") is None
    assert median_of(past[: MIN_HISTORY - 1], "loss") is None and median_of(past[:MIN_HISTORY], "loss") is not None


@pytest.mark.parametrize("sign", [1, -1])
def test_a_spike_is_beyond_the_factor(sign: int, caplog: pytest.LogCaptureFixture) -> None:
    past = history([sign * v for v in (1.0, 2.0, 3.0, 2.0) * 5])
    assert told(sign * 20.0, past) == 0 and told(math.nan, past) == 0 and told(math.inf, past) == 0
    assert told(sign * 20.1, past, None) == 0
    assert not caplog.text
    assert told(sign * 20.1, past) == 1
    assert "10.1 times its median 2" in caplog.text
    assert told(20.1, past[: MIN_HISTORY - 1]) == told(20.1, history([0.0] * 20)) == 0


def test_the_largest_part_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Of four rows with 1 + 1 each, one has 1 + 13."""
    assert told(50.0, history([1.0] * 20, "grad_norm_lora"), name="grad_norm_lora", loss_reverse=13.0) == 1
    assert "update 99: grad_norm_lora is 50, 50 times its median 1" in caplog.text
    assert (
        "the largest loss_forward + loss_reverse, 70% of the sum over 4 rows, is at timestep 600 of a sample for 'a dog'"
        in (caplog.text)
    )


@pytest.mark.parametrize("name", ["residual", "ratio", "reward"])
def test_methods_without_a_loss_by_row_name_what_they_have(name: str, caplog: pytest.LogCaptureFixture) -> None:
    watched = report()
    rows = {name: torch.tensor([1.0, -2.0, 1.0]), "prompt": torch.tensor([0, 1, 0])}
    watched = dataclasses.replace(watched, rows=rows)
    assert guard(10.0).count_spikes(5, {"loss": 99.0}, history([1.0] * 20), watched) == 1
    assert f"the largest {name}, 50% of the sum over 3 rows, is of a sample for 'a dog'" in caplog.text


@pytest.mark.slow
def test_spikes_are_counted_in_the_records_and_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With two updates of history and a factor just above 1, a run of six has some and not only."""
    monkeypatch.setattr(guards, "MIN_HISTORY", 2)
    config = dataclasses.replace(tiny(), spike_factor=1.05)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    without_pictures(Trainer.from_config(config)).train(whole)
    counts = [record["spikes"] for record in records(whole)]
    assert counts[:2] == [0, 0] and any(counts) and 0 in counts[2:]
    assert caplog.text.count("times its median") == sum(counts)
    first = without_pictures(Trainer.from_config(config))
    interrupt(first, 5)
    with pytest.raises(KeyboardInterrupt):
        first.train(cut)
    without_pictures(Trainer.from_config(config)).train(cut, resume=True)
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
