"""A run that is resumed is the same run of W&B; its stand-in here knows runs by id, as the service does."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastnabla.run.tracker import Tracker
from fastnabla.run.wandb_run import FILE, wandb_run_id


class Service:
    """What `wandb.init` with resume="allow" does."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, dict]]] = {}

    def init(self, *, id: str, resume: str, **_: object) -> SimpleNamespace:
        assert resume == "allow"
        steps = self.runs.setdefault(id, [])
        return SimpleNamespace(log=lambda values, step: steps.append((step, values)), finish=lambda: None)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=service.init))
    return service


def logged(folder: Path, update: int) -> None:
    """A process that goes on after `update`, and makes one."""
    tracker = Tracker(folder, "wandb", {}, update)
    tracker.log("train", update + 1, {"loss": 1.0})
    tracker.close()


def test_resuming_goes_on_with_the_run(service: Service, tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    first.mkdir(), other.mkdir()
    for update in (0, 1, 2):
        logged(first, update)
    logged(other, 0)
    steps, (alone,) = service.runs.values()
    assert [step for step, _ in steps] == [1, 2, 3] and alone[0] == 1
    assert (first / FILE).read_text().strip() == next(iter(service.runs))


@pytest.mark.parametrize("content", [b"", b"../x\n", b"\xff\x00", b"a" * 65])
def test_an_id_that_is_none_is_replaced_with_a_warning(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(content)
    new = wandb_run_id(tmp_path)
    assert len(new) == 16 and "has no valid W&B run id" in caplog.text
    assert wandb_run_id(tmp_path) == new
