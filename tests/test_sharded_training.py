"""Whole runs of full finetuning on two processes, that share its weights, and on one, cut down to seconds."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastnabla.config import TrainConfig
from fastnabla.distributed import ALONE, World
from fastnabla.sections import EvaluationConfig
from fastnabla.trainer import Trainer
from tests.checks import relative_error
from tests.ranks import on_ranks
from tests.test_full_finetuning import full

WEIGHTS = "diffusion_pytorch_model.safetensors"


def config() -> TrainConfig:
    return full(evaluation=EvaluationConfig(every=0, samples=2, prompts=1))


def train(run: Path, resume: bool, world: World = ALONE) -> None:
    run.mkdir(exist_ok=True)
    trainer = Trainer(config(), world=world)
    assert trainer.policy.is_sharded == (world.size > 1)
    trainer.train(run, resume=resume)


def cut_off(run: Path, copy: Path) -> Path:
    """A copy of the run as it was after its first update."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "update-000002")
    return copy


def two(folder: Path, world: World) -> bool:
    train(folder / "two", False, world)
    train(folder / "one, then two", True, world)
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "one", False)
    cut_off(folder / "one", folder / "one, then two")
    on_ranks(folder / "ranks", 2, functools.partial(two, folder))
    train(cut_off(folder / "two", folder / "two, then one"), True)
    return folder


def weights(run: Path) -> Tensor:
    return torch.cat([weight.flatten().double() for weight in load_file(run / "unet" / WEIGHTS).values()])


@pytest.mark.parametrize("name", ["two", "one, then two", "two, then one"])
def test_runs_equal_those_of_one_process(folder: Path, name: str) -> None:
    print(relative_error(weights(folder / name), weights(folder / "one")))
    ours, theirs = ([json.loads(line) for line in (folder / run / "metrics.jsonl").open()] for run in (name, "one"))
    for a, b in zip(ours, theirs, strict=True):
        for key in a:
            if a[key] != b[key]:
                print(key, a[key], b[key])
    assert 0
