"""Whole runs of full finetuning on two processes, that share its weights, and on one, cut down to seconds."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastnabla.config.model_sections import LoraConfig, ModelConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, MemoryConfig, OptimizerConfig
from fastnabla.distributed.world import ALONE, World
from fastnabla.training.trainer import Trainer
from tests.checks import relative_error
from tests.integration.test_full_finetuning import full
from tests.ranks import on_ranks
from tests.runs import small, smallest, without_pictures

FAMILIES = ("sd15", "sd3")


def config(family: str) -> TrainConfig:
    """Three updates, with an average of the weights."""
    model = ModelConfig(name=smallest(family), dtype="float32", height=8, width=8)
    evaluation = EvaluationConfig(every=0, samples=2, prompts=1)
    optimizer = OptimizerConfig(learning_rate=1e-4, ema=0.5)
    return dataclasses.replace(full(), updates=3, model=model, evaluation=evaluation, optimizer=optimizer)


def train(config: TrainConfig, run: Path, resume: bool, world: World = ALONE) -> bool:
    trainer = without_pictures(Trainer.from_config(config, world=world))
    trainer.train(run, resume=resume)
    return trainer.policy.is_sharded


def cut_off(run: Path, copy: Path, updates: int) -> Path:
    """A copy of a run as it was after so many updates."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name != f"update-{updates:06d}":
            shutil.rmtree(checkpoint)
    return copy


@pytest.fixture(scope="module", params=FAMILIES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process from the start; two from its first update on; one from their first on."""
    given = dataclasses.replace(config(request.param), checkpoint_keep=3)
    runs = tmp_path_factory.mktemp("runs")
    one, two, again = runs / "one", runs / "two", runs / "again"
    one.mkdir()
    train(given, one, resume=False)
    cut_off(one, two, 1)
    assert on_ranks(runs / "ranks", 2, functools.partial(train, given, two, True)) == [True, True]
    assert not train(given, cut_off(two, again, 2), True)
    return runs


def weights(run: Path) -> Tensor:
    (file,) = run.glob("*/diffusion_pytorch_model.safetensors")
    return torch.cat([weight.flatten().double() for weight in load_file(file).values()])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "again"])
def test_runs_equal_those_of_one_process(runs: Path, name: str) -> None:
    """Weights and their average to rounding, and how far they have moved; the metrics to what that does to losses, of
    residuals in units of 1/σ."""
    for part in (".", "ema"):
        assert relative_error(weights(runs / name / part), weights(runs / "one" / part)) < 1e-6
    ours, theirs = ([json.loads(line) for line in (runs / run / "metrics.jsonl").open()] for run in (name, "one"))
    for record, expected in zip(ours, theirs, strict=True):
        assert record.pop("phase") == expected.pop("phase")
        assert record == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_two_processes_wrote_a_share_each(runs: Path) -> None:
    def shards(run: str, update: int) -> int:
        return len(list((runs / run / "checkpoints" / f"update-{update:06d}" / "weights").iterdir()))

    assert [shards("one", 3), shards("two", 2), shards("two", 3), shards("again", 3)] == [1, 2, 2, 1]


def test_of_a_lora_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory.shard = True: only a LoRA .* --lora.rank 0"):
        small(memory=MemoryConfig(micro_batch=4, decode_chunk=4, shard=True))


@pytest.mark.parametrize(
    ("rank", "shard", "processes", "expected"),
    [(0, None, 2, True), (0, True, 2, True), (0, False, 2, False), (0, None, 1, False), (0, True, 1, False), (8, None, 2, False)],
)  # fmt: skip
def test_which_runs_are_sharded(rank: int, shard: bool | None, processes: int, expected: bool) -> None:
    run = dataclasses.replace(full(), lora=LoraConfig(rank=rank), memory=MemoryConfig(shard=shard))
    assert run.is_sharded(processes) == expected
