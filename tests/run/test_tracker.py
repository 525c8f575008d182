"""What is written during a run, and where."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastnabla.run.tracker import Tracker, read_records, readable_records

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


RECORDS = [json.dumps({"phase": "train", "update": update, "loss": update / 3}) + "\n" for update in range(5)]


@pytest.mark.parametrize("cut", [*range(1, len(RECORDS[4])), 0])
def test_records_after_the_checkpoint_and_cut_lines_are_dropped(cut: int, tmp_path: Path) -> None:
    """A cut last line of a later update; of all but its line feed, the record is whole."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(RECORDS[:4]) + RECORDS[4][:-cut])
    assert [record["update"] for record in read_records(path, 2)] == [0, 1, 2]
    assert path.read_text() == "".join(RECORDS[:3])
    path.write_text("".join(RECORDS[:4]) + RECORDS[4][: -cut or None])
    assert len(read_records(path, 4)) == (5 if cut < 2 else 4)
    assert path.read_text() == "".join(RECORDS[: 5 if cut < 2 else 4])


def test_no_file_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "metrics.jsonl", 2) == readable_records(tmp_path / "metrics.jsonl") == []
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b'{"phase": "train", "upd', b"\x00" * 40, b"\xff\xfe{", b"[1, 2]", b"{}"])
def test_a_damaged_line_costs_no_other(damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(RECORDS[0].encode() + damage + b"\n" + RECORDS[2].encode())
    before = path.read_bytes()
    assert [record["update"] for record in readable_records(path)] == [0, 2] and path.read_bytes() == before
    assert [record["update"] for record in read_records(path, 4)] == [0, 2]
    assert path.read_text() == RECORDS[0] + RECORDS[2]
    assert "line 2 of" in caplog.text


def test_a_resumed_tracker_goes_on_from_its_update(tmp_path: Path) -> None:
    for update in (0, 1):  # the first logs up to 3 and is killed; the second resumes at 1
        tracker = Tracker(tmp_path, "none", {}, update)
        assert [record["update"] for record in tracker.records] == list(range(1, update + 1))
        for later in range(update + 1, 4):
            assert not tracker.has("train", later)
            tracker.log("train", later, METRICS)
            assert tracker.has("train", later) and not tracker.has("evaluate", later)
    for name in ("metrics.jsonl", "timing.jsonl"):
        assert [record["update"] for record in lines(tmp_path / name)] == [1, 2, 3]


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
