"""Checkpoints of a run: which are kept, which is taken, and what is said of the others."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn

from fastnabla.config.model_sections import FlowConfig
from fastnabla.config.training_sections import OptimizerConfig
from fastnabla.optim.optimizer import Optimizer
from fastnabla.rewards import build_reward
from fastnabla.run.checkpoint import CheckpointError, Checkpoints
from fastnabla.run.state import Progress, TrainState
from tests.utils.test_durable import fill


class Stub:
    """What a checkpoint sees of a policy."""

    is_lora, is_sharded = True, False
    updating = contextlib.nullcontext

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.zeros(70, 96))
        self.conditions = torch.zeros(1)

    def trained(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    def trainable(self) -> list[nn.Parameter]:
        return [self.weight]


class StubStep:
    """And of a step that remembers something."""

    def __init__(self) -> None:
        self.micro_batch, self.seen = 8, torch.zeros(3)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.seen.copy_(state["seen"])


def build(run: Path, keep: int = 2, configuration: str = "a", name: str = "adamw") -> Checkpoints:
    policy, flow = Stub(), nn.Linear(3, 4)
    state = TrainState(
        policy=policy,
        flow=flow,
        optimizer=Optimizer(policy, flow, OptimizerConfig(name=name), FlowConfig(), 100),
        reward=build_reward(["area"]),
        step=StubStep(),
        buffer=None,
    )
    return Checkpoints(run, state, configuration, keep)


def update(checkpoints: Checkpoints, number: int) -> None:
    """Go to the state after update `number`, and save it."""
    state = checkpoints.state
    for seed, parameter in enumerate((state.policy.weight, *state.flow.parameters())):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number + 100 * seed))
    state.optimizer.update()
    state.reward.observe({"area": torch.tensor([1.0, number])})
    state.step.micro_batch = 8 - number
    state.step.seen += number
    checkpoints.save(Progress(number))
    checkpoints.written(wait=True)


def kept(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("update-")) for path in (run / "checkpoints").iterdir())


def assert_same(ours: object, theirs: object) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same(ours[name], theirs[name])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion8bit"])
def test_all_of_the_state_comes_back(name: str, tmp_path: Path) -> None:
    saved = build(tmp_path, name=name)
    for number in (1, 2):
        update(saved, number)
    restored = build(tmp_path, name=name)
    assert restored.load() == Progress(2)
    assert (restored.saved, restored.state.step.micro_batch) == (2, 6)
    assert_same(restored.state.state_dict(), saved.state.state_dict())
    assert saved.state.policy.weight.any() and saved.state.step.seen.tolist() == [3, 3, 3]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    checkpoints = build(tmp_path, keep)
    for number in range(1, 6):
        update(checkpoints, number)
        assert kept(tmp_path) == list(range(1, number + 1))[-keep:]


def test_numbers_beyond_six_digits_come_last(tmp_path: Path) -> None:
    checkpoints = build(tmp_path)
    for number in (999_999, 1_000_000):
        checkpoints.save(Progress(number))
        checkpoints.written(wait=True)
    assert build(tmp_path).load().update == 1_000_000


def test_no_checkpoint_is_no_progress(tmp_path: Path) -> None:
    assert build(tmp_path).load() == Progress()


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_damaged_one_is_passed_over_and_named(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = build(tmp_path, keep=3)
    for number in (1, 2, 3):
        update(checkpoints, number)
    damaged = tmp_path / "checkpoints" / "update-000003" / name
    damaged.write_bytes(damaged.read_bytes()[:-20])
    again = build(tmp_path, keep=1)
    assert again.load().update == 2
    assert "update-000003 is damaged" in caplog.text and name in caplog.text
    update(again, 3)  # the damaged one is replaced
    assert kept(tmp_path) == [3]
    caplog.clear()
    assert build(tmp_path).load().update == 3
    assert not caplog.text


def test_a_damaged_one_never_counts_as_the_newest(tmp_path: Path) -> None:
    checkpoints = build(tmp_path)
    for number in (2, 7):
        update(checkpoints, number)
    (tmp_path / "checkpoints" / "update-000007" / "state.pt").unlink()
    again = build(tmp_path, keep=1)
    assert again.load().update == 2
    update(again, 4)
    assert kept(tmp_path) == [4]


def test_none_left_is_an_error_that_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    checkpoints = build(tmp_path)
    for number in (1, 2):
        update(checkpoints, number)
    (tmp_path / "checkpoints" / "update-000001" / "manifest.json").write_bytes(b"{}")
    (tmp_path / "checkpoints" / "update-000002" / "state.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"update-000002: state\.pt has 0 bytes.*update-000001: manifest\.json is not"
    ):
        build(tmp_path).load()


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    update(build(tmp_path), 1)
    with pytest.raises(CheckpointError, match="another configuration"):
        build(tmp_path, configuration="b").load()


def test_a_checkpoint_of_version_0_1_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(CheckpointError, match="earlier version"):
        build(tmp_path).load()


@pytest.mark.parametrize(("what", "call"), [("write", 0), ("write", 20), ("fsync", 0), ("fsync", 2)])
def test_a_full_disk_is_told_with_what_is_needed(
    what: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = build(tmp_path, keep=1)
    update(checkpoints, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.*") if path.is_file()}

    with monkeypatch.context() as patch:
        fill(patch, what, call)
        with pytest.raises(CheckpointError) as error:
            update(checkpoints, 2)
    # The weight, its two moments and the flow network's 16 numbers, thrice too; a float32 counter of each of 3 tensors; the
    # step's 3.
    needed = 4 * (3 * 70 * 96 + 3 * 16 + 3 + 3)
    assert f"{tmp_path}/checkpoints/update-000002" in str(error.value)
    assert "No space left" in str(error.value) and f"needs {needed:,} bytes" in str(error.value)
    after = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.*") if path.is_file()}
    assert after == before
    assert checkpoints.saved == 1
    assert build(tmp_path).load().update == 1
    update(checkpoints, 3)
    assert kept(tmp_path) == [3]
