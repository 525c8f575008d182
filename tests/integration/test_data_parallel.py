"""The same global batch on any number of processes gives the same update.

A network pass of one row has the same bits on every rank, so what is left is the order in which float32 sums are taken:
1e-7 of a gradient's norm. Later updates start from weights that differ by that, which the residuals amplify.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastnabla.config.model_sections import FlowConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, MemoryConfig, RolloutConfig
from fastnabla.distributed.world import ALONE, World
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.collection import rank_ranges
from fastnabla.trajectories.sources import learning_order
from tests.faults import tiny
from tests.ranks import on_ranks
from tests.runs import without_pictures

pytestmark = pytest.mark.usefixtures("one_thread")


def row_by_row(trajectories: int = 10, updates: int = 2, **changes) -> TrainConfig:
    """Two updates of one rollout, each of five trajectories, which neither 2 nor 4 divide; all passes of one row."""
    config = tiny(
        memory=MemoryConfig(micro_batch=1, decode_chunk=1),
        flow=FlowConfig(kind="conv"),
    )
    rollout = RolloutConfig(trajectories=trajectories, fraction=0.5, updates=updates, batch=1)
    evaluation = EvaluationConfig(every=0, samples=3, prompts=1, probe="pixels")
    return dataclasses.replace(config, updates=2, rollout=rollout, evaluation=evaluation, **changes)


def gradient(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in trainer.step.parameters])


def trained(world: World, config: TrainConfig, folder: Path) -> dict:
    """Gradients of all updates, as they are reduced, and what is left in the end."""
    trainer, gradients = without_pictures(Trainer.from_config(config, world=world)), []
    update = trainer.optimizer.update

    def watched(accepts):
        gradients.append(gradient(trainer))
        return update(accepts)

    trainer.optimizer.update = watched
    run = folder / f"run-of-{world.size}"
    if world.is_main:
        run.mkdir()
    world.barrier()
    records = trainer.train(run)
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.step.parameters])
    return {"gradients": gradients, "weights": weights, "records": json.dumps(list(records))}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def assert_same_records(ours: str, theirs: str) -> None:
    """Relative to 1e-6 in the first update, and to what the residuals make of 1e-7 in the weights, 5e-5, in others."""
    for one, other in zip(json.loads(ours), json.loads(theirs), strict=True):
        assert one.keys() == other.keys()
        tolerance = 2e-6 if (one["phase"], one["update"]) in (("evaluate", 0), ("train", 1)) else 1e-4
        for name, value in other.items():
            close = pytest.approx(value, rel=tolerance, abs=1e-7) if isinstance(value, float) else value
            assert one[name] == close, (one["phase"], one["update"], name)


@pytest.mark.slow
def test_same_update_on_1_and_4_processes(tmp_path: Path) -> None:
    config = row_by_row()
    alone = trained(ALONE, config, tmp_path)
    ranks = on_ranks(tmp_path, 4, lambda world: trained(world, config, tmp_path))
    for rank in ranks:
        assert distance(rank["gradients"][0], alone["gradients"][0]) < 1e-6
        assert distance(rank["gradients"][1], alone["gradients"][1]) < 5e-5
        assert distance(rank["weights"], alone["weights"]) < 1e-6
        assert torch.equal(rank["weights"], ranks[0]["weights"])
        assert_same_records(rank["records"], alone["records"])
    written = (tmp_path / "run-of-4" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == json.loads(ranks[0]["records"])


def one_step(world: World, config: TrainConfig) -> dict:
    """The last update of the first rollout, as if it were the first."""
    trainer = Trainer.from_config(config, world=world)
    rollout = trainer.source.collect(0)
    numbers = learning_order(config.seed, 0, trainer.config.rollout)[-1]
    report = trainer.step(trainer.source.select(0, numbers[torch.isin(numbers, trainer.slots)]))
    world.sum_([parameter.grad for parameter in trainer.step.parameters])
    numbers = {name: value.item() for name, value in (report.losses | report.statistics).items()}
    counts = {f"rows {kind}": count for kind, count in report.counts.items()}
    return {"gradient": gradient(trainer), "numbers": numbers | rollout | report.passes | counts}


@pytest.mark.slow
def test_each_kind_of_step_on_2_processes(tmp_path: Path) -> None:
    others = (
        "adjoint",
        "draft-lv",
        "refl",
        "ddpo",
        "dag",
        "dag-kl",
    )  # the others have a step of one of these, or residual ∇-DB's
    configs = {name: row_by_row(5, 1, method=name) for name in others}
    configs["terminal, normalised"] = row_by_row(
        5,
        1,
        objective=dataclasses.replace(row_by_row().objective, reward_gradient="terminal"),
        reward=dataclasses.replace(row_by_row().reward, normalise=True),
    )

    rollout = dataclasses.replace(row_by_row(6).rollout, epochs=2)  # three trajectories an update, in another order
    configs["inner epochs"] = dataclasses.replace(row_by_row(), updates=4, rollout=rollout)

    def each(world: World) -> dict:
        return {name: one_step(world, config) for name, config in configs.items()}

    alone = each(ALONE)
    for rank in on_ranks(tmp_path, 2, each):
        for name, expected in alone.items():
            assert distance(rank[name]["gradient"], expected["gradient"]) < 1e-6, name
            close = {key: pytest.approx(value, rel=2e-6, abs=1e-9) for key, value in expected["numbers"].items()}
            assert rank[name]["numbers"] == close, name


def test_an_update_needs_a_trajectory_for_each_process() -> None:
    world = World()
    world.rank, world.size = 2, 3
    assert rank_ranges(world, 10, 2) == [range(4, 5), range(9, 10)]
    world.size = 6
    with pytest.raises(
        ValueError, match=r"rollout\.trajectories = 10: gives an update 5 .* the 6 processes.* least 12"
    ):
        rank_ranges(world, 10, 2)
