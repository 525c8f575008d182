"""Full finetuning of a tiny UNet, with the same data on every rank: its step, and one update, sharded or not."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastnabla.config.model_sections import FlowConfig
from fastnabla.config.training_sections import OptimizerConfig
from fastnabla.distributed.world import ALONE, World
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.models.conditions import Conditions
from fastnabla.models.decoder import Decoder
from fastnabla.models.flow import build_flow
from fastnabla.models.policy import Policy
from fastnabla.models.random_init import random_pipeline
from fastnabla.objective.settings import Objective
from fastnabla.optim.optimizer import Optimizer
from fastnabla.trajectories.transitions import Transitions
from tests.checks import ddim_table, randn
from tests.families import one_level

STEPS = 5
UPDATES = 3


@dataclasses.dataclass
class Run:
    world: World
    policy: Policy
    step: BalanceStep
    optimizer: Optimizer


def build(world: World = ALONE, dtype: torch.dtype = torch.float32, rank: int = 0, **objective: Any) -> Run:
    """A run, sharded if there are several ranks, or with a LoRA of rank `rank`. The policy differs from its reference, so that
    no term is pure rounding error."""
    pipeline = random_pipeline(one_level("sd15"), {"default": torch.float32})
    policy = Policy(pipeline.unet.to(dtype), Conditions(randn(3, 5, 16).to(dtype)), 3.0, rank)
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable()):
            parameter += 0.05 * randn(*parameter.shape, seed=number)
    if world.size > 1:
        policy.shard(world)
    flow = build_flow("conv", 4, policy.conditions.width, seed=1)
    step = BalanceStep(
        policy,
        flow,
        Decoder(pipeline.vae.requires_grad_(False), 2),
        lambda images, prompts: images.square().mean((1, 2, 3)) + images[:, 0].mean((1, 2)),
        ["a", "b", "c"],
        ddim_table(STEPS),
        Objective(**{"beta": 10.0, "trust_region_weight": 0.1} | objective),
        micro_batch=2,
    )
    step.world = world
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=1e-2)
    return Run(world, policy, step, Optimizer(policy, flow, config, FlowConfig(), UPDATES))


def transitions(number: int) -> Transitions:
    """The transitions of an update: seven inner and three last ones, so that micro-batches differ in size."""
    rows = 10
    step_index = torch.tensor([0, 1, 2, 3, 1, 2, 0, 4, 4, 4])
    shape = (rows, 4, 8, 8)
    return Transitions(
        x=randn(*shape, seed=10 * number),
        x_next=randn(*shape, seed=10 * number + 1),
        model_output=randn(*shape, seed=10 * number + 2),
        step_index=step_index,
        prompt=torch.arange(rows) % 2,
        trajectory=torch.arange(rows),
        reward=torch.zeros(rows),
    )


def update(run: Run, number: int, rows: Tensor) -> dict[str, Tensor]:
    """Make update `number`, of whose transitions this rank computes `rows`; the norms of the whole gradients."""
    run.step(transitions(number)[rows])
    run.world.sum_([parameter.grad for parameter in run.step.replicated])
    with run.policy.updating():
        return run.optimizer.update()


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of possibly sharded ones."""
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in tensors.items()}
