"""Running a study's runs, without training."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from fastnabla.config.train import to_json
from fastnabla.study import running
from fastnabla.study.plan import tuning_runs
from fastnabla.study.protocol import Protocol
from fastnabla.study.recording import record_measured
from tests.study.made_up import TOML, protocol_file, train


def test_a_run_that_ends_early_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    protocol = Protocol.read(protocol_file(tmp_path))
    run = tuning_runs(protocol, tmp_path / "study")[0]
    run.folder.mkdir(parents=True)
    trained = []

    def diverge(runs: list, console: Console, ended: object) -> int:
        trained.extend(runs)
        (run.folder / "config.json").write_text(to_json(run.planned.config))
        return 0

    monkeypatch.setattr(running, "train_all", diverge)
    study, file = tmp_path / "study", tmp_path / "made-up.runs.jsonl"
    assert record_measured([run], protocol, study, file) == {}
    for _ in range(2):
        assert running.run_one(run, protocol, study, file, Console(quiet=True)) == 0
    assert trained == [run.planned]
    assert record_measured([run], protocol, study, file)[run.name].result is None


def test_a_run_that_passes_a_bound_is_recorded_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its last evaluation, the only one after an update, passes the bound, so it has made all updates and all files."""
    bounded = TOML.replace("settings = { ", 'settings = { "evaluation.stop_below_diversity" = "0.5", ', 1)
    protocol = Protocol.read(protocol_file(tmp_path, bounded))
    study, file = tmp_path / "study", tmp_path / "made-up.runs.jsonl"
    run = tuning_runs(protocol, study)[0]

    def pass_bound(*_: object) -> int:
        train(run.planned)
        evaluations = ((0, 2.0), (run.planned.config.updates, 0.9))
        lines = [json.dumps({"phase": "evaluate", "update": n, "pairwise_distance": d}) for n, d in evaluations]
        (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return 0

    monkeypatch.setattr(running, "train_all", pass_bound)
    monkeypatch.setattr(running, "measure_run", lambda *_: pytest.fail("it is measured"))
    assert running.run_one(run, protocol, study, file, Console(quiet=True)) == 0
    assert record_measured([run], protocol, study, file)[run.name].result is None


def test_a_run_that_fails_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    protocol = Protocol.read(protocol_file(tmp_path))
    run = tuning_runs(protocol, tmp_path / "study")[0]
    monkeypatch.setattr(running, "train_all", lambda *_: 130)
    assert running.run_one(run, protocol, tmp_path / "study", tmp_path / "file", Console(quiet=True)) == 130
    assert not run.ended_early and not (tmp_path / "file").exists()
