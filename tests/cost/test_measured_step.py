"""A training step's memory, measured against the plan's phases."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fastnabla.config.model_sections import LoraConfig, ModelConfig, RewardConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, MemoryConfig, RolloutConfig
from fastnabla.cost import planner
from fastnabla.cost.planner import unit_costs
from fastnabla.models.random_init import random_pipeline
from fastnabla.objective.settings import ReverseTarget
from fastnabla.training.trainer import Trainer
from fastnabla.utils.tensor_bytes import LiveBytes
from tests.families import TINY
from tests.runs import small


def measured_share(config: TrainConfig) -> float:
    """What a micro-step of `config` takes, as a share of the larger of the planned phases. Gradients, and all that is made once,
    are there before."""
    trainer, memory = Trainer.from_config(config), config.memory
    trainer.source.collect(0)
    selection = trainer.components.buffer.select()
    last = selection.step_index == len(trainer.table) - 1
    rows = torch.where(~last)[0][: memory.micro_batch]
    assert len(rows) == memory.micro_batch
    if config.objective.reward_gradient == "terminal":
        rows = torch.cat([rows, torch.where(last & torch.isin(selection.trajectory, selection.trajectory[rows]))[0]])
    selection = selection[rows]
    trainer.step(selection)
    with LiveBytes() as measured:
        trainer.step(selection)
    settings = (memory.micro_batch, memory.decode_chunk, bool(memory.checkpoint_network), False)
    return measured.peak / max(planner._step(unit_costs(config), *settings).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro_batch", "chunk", "rank", "target"),
    [
        (4, 1, 4, "policy"),
        (4, 4, 4, "policy"),
        (1, 8, 4, "policy"),
        (1, 1, 0, "policy"),
        (4, 1, 4, "reference"),
    ],
)
def test_measured_step(micro_batch: int, chunk: int, rank: int, target: ReverseTarget) -> None:
    """What a micro-step of the testbed takes is the larger of the planned phases: to 3% as measured, by backward passes and
    by decoding. Their sum would be a decode more. A target that follows the reference takes less than is planned:
    no graph is kept through a backward pass."""
    config = small(
        model=ModelConfig(name="testbed", dtype="float32"),
        lora=LoraConfig(rank=rank),
        rollout=RolloutConfig(trajectories=2 * micro_batch, fraction=0.5, updates=2),
        memory=MemoryConfig(micro_batch=micro_batch, decode_chunk=chunk),
        objective=dataclasses.replace(small().objective, reverse_target=target),
    )
    assert (0.95 if target == "policy" else 0.85) <= measured_share(config) <= 1.05


DEEP = {
    "sd35": {"num_layers": 3, "dual_attention_layers": (0,)},
    "flux": {"num_layers": 1, "num_single_layers": 2},
}
"""A layer of each kind; SD3.5's are dual, plain and the last."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings", "checkpoint"),
    [
        ("sd35", {"reward_gradient": "lookahead"}, True),
        ("flux", {"reward_gradient": "terminal"}, False),
    ],
    ids=str,
)
def test_measured_step_of_flow_models(family: str, settings: dict, checkpoint: bool, tmp_path: Path) -> None:
    """To 5%, with SD3.5's two rows and FLUX's single one."""
    architecture = dataclasses.replace(TINY[family], network=TINY[family].network | DEEP[family])
    random_pipeline(architecture, {"default": torch.float32}).save_pretrained(tmp_path)
    config = small(
        model=ModelConfig(name=str(tmp_path), dtype="float32", height=32, width=32),
        reward=RewardConfig(terms=("hue=1",)),
        lora=LoraConfig(rank=4),
        evaluation=EvaluationConfig(every=2, samples=2, prompts=2),
        rollout=RolloutConfig(trajectories=4, fraction=0.5, updates=2),
        memory=MemoryConfig(micro_batch=2, decode_chunk=1, checkpoint_network=checkpoint),
        objective=dataclasses.replace(small().objective, **settings),
    )
    assert 0.95 <= measured_share(config) <= 1.05
