"""Checkpoints of full finetuning, written and read by one process and by two."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastnabla.distributed.world import ALONE, World
from fastnabla.optim.ema import WeightAverage
from fastnabla.rewards import build_reward
from fastnabla.run.checkpoint import FILE
from fastnabla.run.large_tensors import FOLDER, LargeTensors, read_tensors, write_tensors
from fastnabla.run.state import TrainState
from fastnabla.utils.durable import DamagedError, partial_folder, verify_folder, write_folder
from tests.ranks import on_ranks
from tests.sharded import build, full, update


class Saved:
    """A run with an average of its weights, and what a checkpoint keeps of it."""

    def __init__(self, world: World = ALONE) -> None:
        self.world, self.run = world, build(world)
        policy, step, optimizer = self.run.policy, self.run.step, self.run.optimizer
        self.ema = WeightAverage(policy.trained(), 0.5, policy.updating)
        self.state = TrainState(
            policy=policy,
            flow=step.flow,
            optimizer=optimizer,
            reward=build_reward(["area"]),
            step=step,
            buffer=None,
            ema=self.ema,
        )
        self.large = LargeTensors(policy, optimizer, self.ema)

    def update(self, number: int) -> None:
        update(self.run, number, torch.arange(10))
        self.ema.update()

    def save(self, folder: Path) -> None:
        rest, large = self.large.take_out(self.state.state_dict())

        def fill(partial: Path) -> None:
            write_tensors(partial / FOLDER, large)

        if self.world.is_main:
            write_folder(folder, {FILE: functools.partial(torch.save, rest)}, {}, fill)
        else:
            fill(partial_folder(folder))

    def load(self, folder: Path) -> "Saved":
        rest = torch.load(folder / FILE, weights_only=True)
        self.state.load_state_dict(self.large.put_back(rest, folder / FOLDER))
        return self

    def everything(self) -> dict[str, Any]:
        _, large = self.large.take_out(self.state.state_dict())
        return full(large) | {f"flow.{n}": p.detach().clone() for n, p in self.run.step.flow.named_parameters()}


def resume_from_one(folder: Path, world: World) -> dict[str, Any]:
    """What one process saved, as two have it, who save it again; and what they compute with the averaged weights."""
    saved = Saved(world).load(folder / "one")
    everything = saved.everything()
    saved.save(folder / "two")
    with saved.ema.applied():
        averaged = [weight.detach().clone() for weight in saved.run.policy.weights()]
    return {"everything": everything, "averaged": averaged}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one(folder: Path) -> Saved:
    """After two updates, saved."""
    one = Saved()
    for number in range(2):
        one.update(number)
    one.save(folder / "one")
    return one


@pytest.fixture(scope="module")
def two(one: Saved, folder: Path) -> list[dict[str, Any]]:
    return on_ranks(folder / "ranks", 2, functools.partial(resume_from_one, folder))


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_any_number_of_processes_reads_it(one: Saved, two: list[dict[str, Any]], folder: Path) -> None:
    """From one process to two and back: the same bits, and so after an update more."""
    saved = one.everything()
    assert {name.split(".")[0] for name in saved} == {"policy", "ema", "optimizer", "flow"}
    averages = [value for name, value in saved.items() if name.startswith("ema")]
    for result in two:
        assert_equal(result["everything"], saved)
        assert all(map(torch.equal, result["averaged"], averages))
    again = Saved().load(folder / "two")
    assert_equal(again.everything(), saved)
    for run in (one, again):
        run.update(2)
    assert_equal(again.everything(), one.everything())


@pytest.mark.slow
def test_each_process_writes_its_half(two: list[dict[str, Any]], folder: Path) -> None:
    """Of every tensor, without a pickle: safetensors, the rest of the state, and a manifest of them all."""
    whole = folder / "two"
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    shards = sorted(name for name in names if name.startswith(FOLDER))
    assert len(shards) == 2 and all(name.endswith(".safetensors") for name in shards)
    assert names == {*shards, FILE, "manifest.json"}
    assert verify_folder(whole)["files"].keys() == {*shards, FILE}
    for name in shards:
        with safe_open(whole / name, "pt") as file:
            shape = file.get_slice("policy.conv_in.weight").get_shape()
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        assert shape == [4, 4, 3, 3]
        assert offsets["policy.conv_in.weight"]["saved_offsets"][0] in (0, 4)


@pytest.mark.slow
def test_a_damaged_share_is_found(two: list[dict[str, Any]], folder: Path) -> None:
    shard = max((folder / "two" / FOLDER).iterdir())
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedError, match=shard.name):
        verify_folder(folder / "two")
    shard.unlink()
    with pytest.raises(DamagedError, match=shard.name):
        verify_folder(folder / "two")
    shard.write_bytes(content)
    verify_folder(folder / "two")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"weight": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match="weight"):
        read_tensors(tmp_path / "a", {"weight": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="bias"):
        read_tensors(tmp_path / "a", {"bias": torch.zeros(4)})
    with pytest.raises(OSError):
        write_tensors(Path("/dev/null/a"), {"weight": torch.zeros(4, 2)})


def uneven(folder: Path, world: World) -> dict[str, Tensor]:
    """A tensor with fewer rows than processes, and one that does not divide."""
    mesh = init_device_mesh("cpu", (world.size,))
    values = {"single": torch.arange(3.0).view(1, 3), "odd": torch.arange(10.0).view(5, 2)}
    tensors = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in values.items()}
    write_tensors(folder, tensors)
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    read_tensors(folder, read)
    return full(read)


def test_rows_need_not_divide(tmp_path: Path) -> None:
    for result in on_ranks(tmp_path, 2, functools.partial(uneven, tmp_path / "odd")):
        assert_equal(result, {"single": torch.arange(3.0).view(1, 3), "odd": torch.arange(10.0).view(5, 2)})


def test_channels_last_weights(tmp_path: Path) -> None:
    """As full finetuning has them on a GPU, with their moments. Their layout stays."""
    weights = torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)
    write_tensors(tmp_path, {"policy.weight": weights})
    read = torch.zeros_like(weights)
    read_tensors(tmp_path, {"policy.weight": read})
    assert torch.equal(read, weights) and read.stride() == weights.stride() and not weights.is_contiguous()
