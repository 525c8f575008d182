"""Checkpoints are written while training goes on, and are of the moment they were asked for."""

import io
import json
import threading
from pathlib import Path

import pytest
import torch

from fastnabla.run import checkpoint
from fastnabla.run.checkpoint import CheckpointError
from fastnabla.run.host_copy import host_copy
from fastnabla.run.state import Progress
from fastnabla.training.trainer import Trainer
from tests.faults import tiny
from tests.run.test_checkpoint import assert_same, build, kept, update
from tests.runs import without_pictures
from tests.utils.test_durable import fill


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Checkpoints are not written before it is set."""
    opened, write = threading.Event(), checkpoint.write_folder

    def waiting(*arguments) -> None:
        assert opened.wait(30)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_folder", waiting)
    yield opened
    opened.set()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_state_is_that_of_the_moment_though_training_goes_on(
    name: str, tmp_path: Path, gate: threading.Event
) -> None:
    gate.set()
    checkpoints = build(tmp_path, name=name)
    update(checkpoints, 1)
    gate.clear()
    expected = host_copy(checkpoints.state.state_dict())
    checkpoints.save(Progress(2))
    assert checkpoints.saved == 2 and checkpoints.written() == [] and kept(tmp_path) == [1]
    with torch.no_grad():
        checkpoints.state.policy.weight += 1
    checkpoints.state.policy.weight.grad = torch.ones(70, 96)
    checkpoints.state.optimizer.update()
    checkpoints.state.reward.observe({"area": torch.tensor([5.0])})
    checkpoints.state.step.seen += 9
    gate.set()
    (cost,) = checkpoints.written(wait=True)
    assert cost["update"] == 2 and 0 < cost["checkpoint_stall_seconds"] < cost["checkpoint_seconds"]
    restored = build(tmp_path, name=name)
    assert restored.load() == Progress(2)
    assert_same(host_copy(restored.state.state_dict()), expected)


def test_the_next_one_waits_and_both_are_reported(tmp_path: Path, gate: threading.Event) -> None:
    checkpoints = build(tmp_path)
    checkpoints.save(Progress(1))
    threading.Timer(0.1, gate.set).start()
    checkpoints.save(Progress(2))
    assert gate.is_set() and (tmp_path / "checkpoints" / "update-000001").is_dir()
    assert [cost["update"] for cost in checkpoints.written(wait=True)] == [1, 2]
    assert checkpoints.written(wait=True) == []


@pytest.mark.parametrize("asked_by", ["written", "save"])
def test_what_cannot_be_written_is_told_to_who_asks_next(
    asked_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = build(tmp_path)
    update(checkpoints, 1)
    with monkeypatch.context() as patch:
        fill(patch, "write", 0)
        checkpoints.save(Progress(2))
        checkpoints.close()  # does not raise
        with pytest.raises(CheckpointError, match="update-000002 cannot be written: No space left"):
            checkpoints.written(wait=True) if asked_by == "written" else checkpoints.save(Progress(3))
    assert checkpoints.saved == 1 and kept(tmp_path) == [1]


def test_what_shares_memory_still_does_in_the_copy() -> None:
    whole = torch.arange(1000.0).view(10, 100)
    state = {"a": whole, "b": [whole, {"c": (whole.t(), 3)}], "d": whole[1], "e": whole.view(torch.int32)}
    copied = host_copy(state)
    assert_same(copied, state)
    assert copied["a"] is copied["b"][0] and copied["a"].data_ptr() != whole.data_ptr()
    assert copied["b"][1]["c"][0].stride() == whole.t().stride()
    whole.zero_()
    assert copied["a"].any() and copied["d"].any() and copied["e"].any()
    file = io.BytesIO()
    torch.save(host_copy({"tables": [whole] * 50}), file)
    assert len(file.getvalue()) < 2 * whole.nbytes


@pytest.mark.slow
def test_a_run_notes_what_each_checkpoint_took(tmp_path: Path) -> None:
    without_pictures(Trainer.from_config(tiny())).train(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "timing.jsonl").open()]
    costs = [record for record in records if record["phase"] == "checkpoint"]
    assert [cost["update"] for cost in costs] == [2, 4, 6]
    assert all(0 < cost["checkpoint_stall_seconds"] < cost["checkpoint_seconds"] for cost in costs)
