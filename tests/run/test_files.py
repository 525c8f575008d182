"""The files of a run: begun once, resumed from the newest checkpoint, one checkpoint per update."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastnabla.distributed.world import ALONE
from fastnabla.prompts import RunPrompts
from fastnabla.run.files import RunFiles
from fastnabla.run.lock import RunFolderError
from fastnabla.run.state import Progress
from tests.faults import tiny
from tests.run.test_checkpoint import build

PROMPTS = RunPrompts(texts=["a cat", "a dog"], trained=2, evaluated=range(1))


def files(folder: Path, resume: bool, updates: int = 6) -> RunFiles:
    config = dataclasses.replace(tiny(), updates=updates)
    return RunFiles(folder, config, PROMPTS, build(folder).state, ALONE, resume)


def test_a_run_is_begun_once(tmp_path: Path) -> None:
    files(tmp_path, resume=False).close()
    assert json.loads((tmp_path / "config.json").read_text())["updates"] == 6
    assert RunPrompts.load(tmp_path / "prompts.json") == PROMPTS
    with pytest.raises(RunFolderError, match="already holds a run; resume it"):
        files(tmp_path, resume=False)


def test_an_update_is_saved_once_and_resumed(tmp_path: Path) -> None:
    first = files(tmp_path, resume=False)
    assert first.start == Progress()
    for _ in range(2):
        first.save(Progress(2), wait=True)
    first.close()
    written = [json.loads(line) for line in (tmp_path / "timing.jsonl").open()]
    assert [(record["phase"], record["update"]) for record in written] == [("checkpoint", 2)]
    again = files(tmp_path, resume=True)
    assert again.start == Progress(2)
    again.save(Progress(2), wait=True)
    again.close()
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == 1


def test_a_run_that_has_done_more_updates_is_refused(tmp_path: Path) -> None:
    """With a constant learning rate the number of updates is no part of the configuration's identity."""
    constant = dataclasses.replace(tiny(), optimizer=dataclasses.replace(tiny().optimizer, schedule="constant"))
    state = build(tmp_path).state
    begun = RunFiles(tmp_path, constant, PROMPTS, state, ALONE, resume=False)
    begun.save(Progress(4), wait=True)
    begun.close()
    with pytest.raises(RunFolderError, match=r"updates = 2: the run has done 4"):
        RunFiles(tmp_path, dataclasses.replace(constant, updates=2), PROMPTS, state, ALONE, resume=True)
