"""Whatever ends a run, the resumed one ends as if nothing had happened, bit for bit."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastnabla.run.checkpoint import Checkpoints
from fastnabla.run.resuming import fingerprint
from fastnabla.training.trainer import Trainer
from fastnabla.utils.durable import DamagedError, verify_folder
from tests.faults import CHECKPOINT_FAILED, assert_same_result, attempt, tiny
from tests.integration.disk_campaign import fault, on_disk
from tests.integration.failing_disk import FailingDisk
from tests.integration.kill_campaign import RANDOM, Single, campaign
from tests.integration.kill_points import die_in_call, die_in_record, die_in_write
from tests.runs import without_pictures
from tests.utils.test_durable import fill, places


@pytest.fixture(scope="module")
def trainer(one_thread: None) -> Trainer:
    """As it was built; forks train it."""
    return without_pictures(Trainer.from_config(tiny()))


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing happened to, and the seconds it took. It runs in this process, which then has all loaded."""
    run = tmp_path_factory.mktemp("undisturbed")
    another = without_pictures(Trainer.from_config(tiny()))
    started = time.perf_counter()
    another.train(run)
    return run, time.perf_counter() - started


def finish(trainer: Trainer, run: Path, expected: Path) -> None:
    assert attempt(trainer, run, lambda: None, None, 0) == 0
    assert_same_result(run, expected)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


def before(owner: object, name: str, call: int, action: Callable[[], None]) -> None:
    """Do `action` at the beginning of call number `call`, from 0, of `owner.name`."""
    function, calls = getattr(owner, name), []

    def acting(*arguments):
        calls.append(None)
        if len(calls) == call + 1:
            action()
        return function(*arguments)

    setattr(owner, name, acting)


@pytest.mark.slow
def test_killed_again_and_again(trainer: Trainer, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    phases = ("rollout", "best weights, moved", "checkpoint, flushed", *RANDOM)
    counts = campaign({name: Single(trainer, *undisturbed) for name in phases}, tmp_path, kills=5, seed=1)
    assert sum(count.kills for count in counts.values()) >= 5
    assert not any(count.differences for count in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm",
    [
        functools.partial(die_in_write, 1100),
        functools.partial(die_in_call, os, "replace", 3, False),
        functools.partial(die_in_record, 5),
    ],
    ids=["write", "rename", "record"],
)
def test_killed_at_a_certain_point(
    arm: Callable[[], None], trainer: Trainer, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    assert attempt(trainer, tmp_path, arm, None, 0) == -signal.SIGKILL
    finish(trainer, tmp_path, undisturbed[0])


@pytest.mark.slow
def test_a_signal_between_two_updates_of_a_rollout_loses_nothing(
    trainer: Trainer, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    """The third update, the first of its rollout, is finished and saved; the rollout is not sampled again."""
    run, again = tmp_path / "run", tmp_path / "again"
    run.mkdir()

    def arm() -> None:
        before(trainer.optimizer, "update", 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))

    assert attempt(trainer, run, arm, None, 0) == 138
    assert checkpoints(run) == ["update-000002", "update-000003"]
    records = (run / "metrics.jsonl").read_text()
    assert (undisturbed[0] / "metrics.jsonl").read_text().startswith(records)
    assert '"update": 3' in records.splitlines()[-1]

    shutil.copytree(run, again)

    def arm_again() -> None:
        trainer.source = dataclasses.replace(trainer.source, rollout=lambda rollout_index: os._exit(9))

    assert attempt(trainer, again, arm_again, None, 0) == 9
    assert '"update": 4' in (again / "metrics.jsonl").read_text()
    finish(trainer, run, undisturbed[0])


@pytest.mark.slow
def test_a_signal_during_the_evaluation_comes_back_to_it(
    trainer: Trainer, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    def arm() -> None:
        before(trainer, "evaluate", 0, lambda: os.kill(os.getpid(), signal.SIGTERM))

    assert attempt(trainer, tmp_path, arm, None, 0) == 143
    assert checkpoints(tmp_path)[-1] == "update-000004"
    assert not (tmp_path / "lora").exists()
    # Killed in the repeated evaluation once more, when the weights are not yet in their place.
    assert attempt(trainer, tmp_path, lambda: die_in_record(0), None, 0) == -signal.SIGKILL
    finish(trainer, tmp_path, undisturbed[0])


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint(trainer: Trainer, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    def arm() -> None:
        fill(pytest.MonkeyPatch(), "write", 1100)  # undone by the fork's end

    assert attempt(trainer, tmp_path, arm, None, 0) == CHECKPOINT_FAILED
    assert checkpoints(tmp_path) == ["update-000002"]
    finish(trainer, tmp_path, undisturbed[0])


@pytest.mark.slow
def test_a_disk_over_quota_ends_the_run_in_one_line(
    trainer: Trainer, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    """Where records are written. `python -m tests.integration.disk_campaign` tries every operation."""
    assert not fault(trainer, tmp_path / "run", undisturbed[0], 20, errno.EDQUOT)


def test_a_read_only_folder_ends_the_run_in_one_line(trainer: Trainer, tmp_path: Path) -> None:
    """At its lock, before it is written to."""
    status, lines, _ = on_disk(trainer, tmp_path, FailingDisk(tmp_path, 0, errno.EROFS, named=True))
    assert status == 1 and len(lines) == 1
    assert lines[0].startswith("error: ") and str(tmp_path) in lines[0] and "Read-only file system" in lines[0]


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(trainer: Trainer, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    """By a year, there and back, at each reading."""
    year, clock, signs = 3.2e7, time.time, itertools.cycle((1, -1))

    def arm() -> None:
        time.time = lambda: clock() + next(signs) * year

    assert attempt(trainer, tmp_path, arm, None, 0) == 0
    assert_same_result(tmp_path, undisturbed[0])
    for line in (tmp_path / "timing.jsonl").open():
        measured = json.loads(line)
        assert all(0 <= value < year for name, value in measured.items() if name.endswith("seconds"))


def test_a_checkpoint_that_ends_or_is_empty_from_any_block_on_is_damaged(
    undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    """A block has 4 KiB. A file that keeps its size is found by its digest."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(undisturbed[0] / "checkpoints" / "update-000006", folder)
    path = folder / "state.pt"
    content = path.read_bytes()
    for block in range(0, len(content), 4096):
        path.write_bytes(content[:block])
        with pytest.raises(DamagedError, match=r"state\.pt has"):
            verify_folder(folder)
        if block // 4096 % 16 == 0:
            path.write_bytes(content[:block] + bytes(len(content) - block))
            with pytest.raises(DamagedError, match="SHA-256"):
                verify_folder(folder)
    path.write_bytes(content)
    verify_folder(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_damaged_file_of_the_newest_checkpoint_costs_no_more_than_that(
    name: str, trainer: Trainer, undisturbed: tuple[Path, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed[0], run)
    fresh = Trainer.from_config(tiny())
    found = Checkpoints(run, fresh.components.state, fingerprint(fresh.config, fresh.prompts), 2)
    assert found.load().update == 6
    path = run / "checkpoints" / "update-000006" / name
    content = path.read_bytes()
    for place in places(len(content) - 1):
        for damaged in (content[:place], flipped(content, place)):
            path.write_bytes(damaged)
            caplog.clear()
            assert found.load().update == 4
            assert f"update-000006 is damaged and is skipped: {name}" in caplog.text
    finish(trainer, run, undisturbed[0])
    assert checkpoints(run) == ["update-000004", "update-000006"]
