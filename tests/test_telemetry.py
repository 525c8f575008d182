"""What is written during a run, and where."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastnabla.telemetry import Tracker

METRICS, MEASURED = {"loss": 0.5, "reward": 2.0}, {"gpu_power_watts": 310.5, "energy_joules_per_transition": 15.0}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_the_seed_does_not_determine_stays_out_of_the_metrics(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "none", {})
    tracker.log("train", 1, METRICS, measured=MEASURED)
    tracker.log("evaluate", 1, METRICS)
    tracker.close()
    metrics, timing = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "timing.jsonl")
    assert metrics == tracker.records == [{"phase": phase, "update": 1, **METRICS} for phase in ("train", "evaluate")]
    assert 0 < timing[0].pop("seconds") < timing[1].pop("seconds") < 60
    assert timing == [{"phase": "train", "update": 1, **MEASURED}, {"phase": "evaluate", "update": 1}]


def test_tensorboard_shows_both(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "tensorboard", {})
    tracker.log("train", 3, METRICS, measured=MEASURED)
    tracker.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert shown == {
        "train/loss": [(3, 0.5)],
        "train/reward": [(3, 2.0)],
        "gpu/gpu_power_watts": [(3, 310.5)],
        "gpu/energy_joules_per_transition": [(3, 15.0)],
    }


def test_wandb_gets_both_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((values, step)), finish=lambda: logged.append("finished")
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    tracker = Tracker(tmp_path, "wandb", {})
    tracker.log("train", 3, METRICS, measured=MEASURED)
    tracker.close()
    assert logged == [
        (
            {
                "train/loss": 0.5,
                "train/reward": 2.0,
                "gpu/gpu_power_watts": 310.5,
                "gpu/energy_joules_per_transition": 15.0,
            },
            3,
        ),
        "finished",
    ]
