"""`--deterministic`: what it switches on, when, and that a run goes through under it. On a CPU; whether two runs on a GPU are
equal, a GPU has to show."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastnabla import train
from fastnabla.config.train import to_json
from fastnabla.config.training_sections import ComputeConfig
from fastnabla.distributed.world import World
from fastnabla.training.trainer import Trainer
from fastnabla.utils.determinism import WORKSPACE, make_deterministic
from tests.faults import assert_same_result, tiny
from tests.runs import without_pictures


@pytest.fixture(autouse=True)
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Off before and after."""
    monkeypatch.setenv(WORKSPACE, "")  # so that the variable is put back
    monkeypatch.delenv(WORKSPACE)
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def switched_on() -> bool:
    return (
        os.environ.get(WORKSPACE) == ":4096:8"
        and torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
        and not torch.backends.cudnn.benchmark
    )


def test_switches_and_the_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    make_deterministic()
    assert switched_on()
    make_deterministic()
    assert switched_on() and len(caplog.records) == 1 and "slower on a GPU" in caplog.text


def test_a_workspace_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    make_deterministic()
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":4096:2")
    with pytest.raises(ValueError, match=f"{WORKSPACE} = ':4096:2': must be :4096:8 or :16:8; change or unset it"):
        make_deterministic()


def test_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match=f"CUDA is already initialised; set {WORKSPACE}=:4096:8 before"):
        make_deterministic()
    assert not torch.are_deterministic_algorithms_enabled() and WORKSPACE not in os.environ


@pytest.mark.parametrize(
    "command", ["--deterministic", "--resume {run}", "--run {run} --resume auto --deterministic", ""]
)
def test_the_command_line_switches_before_cuda_starts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes take their GPU in `World.start`. A resumed run is what it was."""
    (tmp_path / "config.json").write_text(to_json(tiny(deterministic=True)))
    seen = []

    def start(*_: object) -> None:
        seen.append(switched_on())
        raise ValueError

    monkeypatch.setattr(World, "start", start)
    assert train.main(["testbed", *command.format(run=tmp_path).split()]) == 2
    assert seen == [bool(command)] and not torch.cuda.is_initialized()


@pytest.mark.slow
def test_equal_runs_write_equal_files(tmp_path: Path) -> None:
    for name in ("one", "other"):
        trainer = without_pictures(Trainer.from_config(dataclasses.replace(tiny(), deterministic=True)))
        assert switched_on()
        (tmp_path / name).mkdir()
        trainer.train(tmp_path / name)
    assert_same_result(tmp_path / "one", tmp_path / "other")


def test_other_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute\.attention = 'xformers': .*use sdpa with deterministic = True"):
        tiny(deterministic=True, compute=ComputeConfig(attention="xformers"))
