"""Runs that are made longer than they were begun."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastnabla import train
from fastnabla.config.train import load_run, to_json
from fastnabla.models import pipeline
from fastnabla.objective.settings import Objective
from fastnabla.run.resuming import AUTO, fingerprint, run_to_resume, updates_of
from fastnabla.training.trainer import Trainer
from tests.faults import assert_same_result
from tests.run.test_resuming import BASE, PROMPTS, begun
from tests.runs import ON_SMALLEST

QUICK = [
    *ON_SMALLEST,
    "--tracker=none",
    "--optimizer.schedule=constant",
    "--sampler.steps=2",
    "--rollout.trajectories=2",
    "--rollout.fraction=0.5",
    "--evaluation.every=1",
    "--evaluation.samples=2",
    "--evaluation.prompts=2",
    "--memory.micro-batch=4",
    "--memory.decode-chunk=4",
]
CONSTANT = dataclasses.replace(BASE, optimizer=dataclasses.replace(BASE.optimizer, schedule="constant"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_write_pictures", lambda *_: None)  # most of such a run's time


def set_updates(run: Path, updates: int) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"updates": updates}))


@pytest.mark.slow
def test_an_extended_run_equals_one_of_that_length_from_the_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extended twice: on the command line, and in its config.json. Each length is evaluated at its end, so all are. Two of
    ten prompts, of 4 KiB each, are kept at a time, so that each process encodes other ones before."""
    monkeypatch.setattr(pipeline, "DEVICE_BYTES", 3 * 4096)
    monkeypatch.setattr(pipeline, "HOST_BYTES", 2 * 4096)
    assert train.main([*QUICK, "--run=whole", "--updates=3"]) == 0
    command = [*QUICK, "--run=run", "--resume=auto"]
    assert train.main([*command, "--updates=1"]) == 0
    assert train.main([*command, "--updates=2"]) == 0
    assert "updates = 2: the run of 1 updates is extended" in capsys.readouterr().out
    assert load_run(Path("run")).updates == 2
    set_updates(Path("run"), 3)
    assert train.main([*command, "--updates=2"]) == 0  # what started the job last is no reason to stop earlier
    assert "updates = 2 is ignored: the run has 3" in capsys.readouterr().out
    assert_same_result(Path("run"), Path("whole"))

    set_updates(Path("run"), 2)
    before = Path("run/metrics.jsonl").read_bytes()
    assert train.main(["--resume=run"]) == 2
    assert "updates = 2: the run has done 3" in " ".join(capsys.readouterr().err.split())
    assert Path("run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_step_size_depends_on_the_length(schedule: str, tmp_path: Path) -> None:
    optimizer = dataclasses.replace(BASE.optimizer, schedule=schedule)
    falling = dataclasses.replace(BASE, optimizer=optimizer)
    longer = dataclasses.replace(falling, updates=2 * BASE.updates)
    assert fingerprint(longer, PROMPTS) != fingerprint(falling, PROMPTS)
    begun(tmp_path / "run", falling)
    with pytest.raises(ValueError, match=rf"cannot be extended with optimizer\.schedule = '{schedule}'"):
        run_to_resume(dataclasses.replace(longer, resume=AUTO, run=tmp_path / "run"))


def test_an_annealed_beta_depends_on_the_length(tmp_path: Path) -> None:
    annealed = dataclasses.replace(CONSTANT, method="dag", objective=Objective(beta_schedule="linear"))
    longer = dataclasses.replace(annealed, updates=2 * BASE.updates)
    assert fingerprint(longer, PROMPTS) != fingerprint(annealed, PROMPTS)
    begun(tmp_path / "run", annealed)
    with pytest.raises(ValueError, match=r"cannot be extended with objective\.beta_schedule = 'linear'"):
        run_to_resume(dataclasses.replace(longer, resume=AUTO, run=tmp_path / "run"))


def test_a_constant_one_does_not(tmp_path: Path) -> None:
    longer = dataclasses.replace(CONSTANT, updates=2 * BASE.updates)
    assert fingerprint(longer, PROMPTS) == fingerprint(CONSTANT, PROMPTS)
    begun(tmp_path / "run", CONSTANT)
    auto = dataclasses.replace(longer, resume=AUTO, run=tmp_path / "run")
    assert run_to_resume(auto)[1] == [f"updates = {longer.updates}: the run of {BASE.updates} updates is extended"]
    assert (tmp_path / "run" / "config.json").read_text() == to_json(CONSTANT)
    assert updates_of(auto, CONSTANT) == updates_of(CONSTANT, longer) == longer.updates
    assert updates_of(dataclasses.replace(longer, resume=tmp_path), CONSTANT) == BASE.updates
    shorter = dataclasses.replace(auto, updates=1)
    assert run_to_resume(shorter)[1] == [f"updates = 1 is ignored: the run has {BASE.updates}"]
