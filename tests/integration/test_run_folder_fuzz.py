"""Whatever has happened to a run folder: it is resumed, or an error says which file is at fault; never a traceback."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastnabla import train
from fastnabla.config.train import load_run
from fastnabla.prompts import RunPrompts
from fastnabla.run.checkpoint import CheckpointError, newest_checkpoint
from fastnabla.run.table import final_table
from fastnabla.run.tracker import Tracker, read_records
from fastnabla.training import command
from fastnabla.training.trainer import Trainer
from fastnabla.utils.durable import verify_folder, write_folder
from tests.config.test_config_fuzz import VALUES
from tests.faults import tiny
from tests.run.test_tracker import lines
from tests.runs import without_pictures

FILES = (
    "config.json",
    "prompts.json",
    "metrics.jsonl",
    "timing.jsonl",
    "checkpoints/update-000006/state.pt",
    "checkpoints/update-000006/manifest.json",
)
PLACES = (
    *FILES,
    ".lock",
    "checkpoints",
    "checkpoints/update-000006",
    "lora",
    "table.md",
    ".weights.partial",
    "samples",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended."""
    run = tmp_path_factory.mktemp("run")
    without_pictures(Trainer.from_config(tiny())).train(run)
    return run


@pytest.fixture(scope="module")
def resume(finished: Path) -> Callable[[Path], int]:
    """Resume a copy of that run, whose trainer is built once."""
    trainer = without_pictures(Trainer.from_config(tiny()))
    state = {name: parameter.detach().clone() for name, parameter in trainer.policy.trained().items()}

    def built(config, prompts, world):
        trainer.prompts = prompts
        with torch.no_grad():
            for name, parameter in trainer.policy.trained().items():
                parameter.copy_(state[name])
        return trainer

    def go_on(run: Path) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "_built", built)
            return train.main(["--resume", str(run)])

    return go_on


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def folder(path: Path) -> None:
    path.mkdir()
    (path / "unexpected").touch()


DAMAGE = {
    "random": lambda path: path.write_bytes(random.Random(0).randbytes(3000)),
    "deep": lambda path: path.write_bytes(b"[" * 200_000),
    "folder": folder,
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "damage"), [(place, list(DAMAGE)[(i + j) % 4]) for i, place in enumerate(PLACES) for j in (0, 1)]
)
def test_anything_in_a_files_place(
    place: str, damage: str, run: Path, resume: Callable[[Path], int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / place
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    DAMAGE[damage](path)
    status = resume(run)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    if status:
        assert status in (1, 2)
        assert message.startswith("error: ") and path.parts[-1] in message, message
    else:
        assert ("evaluate", 6) in [(record["phase"], record["update"]) for record in lines(run / "metrics.jsonl")]


@pytest.mark.parametrize("place", FILES[-2:])
def test_a_pipe_is_not_waited_for(place: str, run: Path) -> None:
    (run / place).unlink()
    os.mkfifo(run / place)
    newest = newest_checkpoint(run)
    assert newest is not None and newest[0].name == "update-000004"


@pytest.mark.slow
@given(content=st.binary(max_size=200), place=st.integers(0, 10**6), cut=st.booleans())
@settings(max_examples=60)
@example(content=b"\t", place=1, cut=False)  # where JSON may have other white space
@pytest.mark.parametrize("name", ["config.json", "prompts.json", "metrics.jsonl", "manifest.json", "state.pt"])
def test_bytes_anywhere(name: str, content: bytes, place: int, cut: bool, finished: Path, tmp_path: Path) -> None:
    """Bytes put over a file's own, which may end after them: read, or a ValueError or a damaged checkpoint that names it.
    What is accepted of a checkpoint is what was written; of its manifest, what it says."""
    source = finished / name
    if not source.exists():
        source = finished / "checkpoints" / "update-000006" / name
    original = source.read_bytes()
    place %= len(original)
    changed = original[:place] + content + (b"" if cut else original[place + len(content) :])
    folder = tmp_path / "checkpoints" / "update-000006"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (finished / "checkpoints" / "update-000006").iterdir():
        shutil.copy(path, folder)
    path = (folder if name in ("manifest.json", "state.pt") else tmp_path) / name
    path.write_bytes(changed)
    try:
        if name == "config.json":
            load_run(tmp_path)
        elif name == "prompts.json":
            RunPrompts.load(path)
        elif name == "metrics.jsonl":
            assert set(map(str, read_records(path, 6))) - set(map(str, lines(path))) == set()
        else:
            newest_checkpoint(tmp_path)
            assert changed == original or (name == "manifest.json" and json.loads(changed) == json.loads(original))
    except (ValueError, CheckpointError) as error:
        assert name in str(error)
        assert name != "metrics.jsonl"


@given(value=VALUES, field=st.sampled_from(["texts", "trained", "evaluated"]))
@settings(max_examples=60)
def test_prompts_of_other_types(value, field: str, finished: Path, tmp_path: Path) -> None:
    values = json.loads((finished / "prompts.json").read_text()) | {field: value}
    (tmp_path / "prompts.json").write_text(json.dumps(values))
    try:
        prompts = RunPrompts.load(tmp_path / "prompts.json")
    except ValueError as error:
        assert "prompts.json" in str(error)
    else:
        assert all(isinstance(text, str) for text in prompts.texts)
        assert prompts.evaluated.stop <= len(prompts.texts) >= prompts.trained > 0


@pytest.mark.slow
@given(records=st.lists(VALUES | st.dictionaries(st.sampled_from(["phase", "update", "reward"]), VALUES), max_size=5))
@settings(max_examples=60)
def test_any_records(records: list, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    kept = read_records(path, 2**40)
    assert kept == lines(path)
    assert all(isinstance(record["phase"], str) and isinstance(record["update"], int) for record in kept)
    tracker = Tracker(tmp_path, "none", {}, 2**40)
    tracker.last_in_a_row("skipped")
    tracker.log("evaluate", 2**41, {"reward": 1.0, "reward_std": 0.0, "vendi": float("nan")})
    final_table(tracker.records, 8)


def test_edited_prompts_are_refused(
    run: Path, resume: Callable[[Path], int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "prompts.json"
    path.write_text(path.read_text().replace("giraffe", "gorilla"))
    assert resume(run) == 1
    assert "prompts.json" in capsys.readouterr().err


def test_a_whole_checkpoint_of_other_content_is_refused(
    run: Path, resume: Callable[[Path], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """As another version of fastnabla may write."""
    folder = run / "checkpoints" / "update-000006"
    facts = {name: value for name, value in verify_folder(folder).items() if name not in ("files", "seal")}
    write_folder(folder, {"state.pt": lambda file: torch.save({"policy": {}}, file)}, facts)
    assert resume(run) == 1
    message = capsys.readouterr().err
    assert "update-000006" in message and "does not fit this run" in message
