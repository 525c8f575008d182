"""Sampling trajectories, ``x' = a x + b o + σ ε``."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastnabla.models.policy import Policy
from fastnabla.objective.backend import select
from fastnabla.objective.ops import ObjectiveOps
from fastnabla.objective.settings import Backend
from fastnabla.transition import TransitionTable
from fastnabla.utils.seeding import TrajectoryNoise


class Recorder(Protocol):
    """Receives a rollout's steps: a `TrajectoryBuffer`, or a `fastnabla.metrics.divergence.TrajectoryDivergence`."""

    def append(self, slots: Tensor, step: int, x: Tensor, model_output: Tensor, x_next: Tensor) -> None:
        """Record step `step` of the trajectories `slots [n]`: states x, guided outputs o and next states x', `[n, …]`."""


def advance(
    policy: Policy, table: TransitionTable, ops: ObjectiveOps, step: int, x: Tensor, noise: Tensor, prompt: Tensor
) -> tuple[Tensor, Tensor]:
    """Take one step of N trajectories.

    Args:
        policy: predicts the outputs.
        table: the sampler.
        ops: computes the step. Plain torch's operations have gradients.
        step: number of the step.
        x, noise: states and noise, `[N, C, H, W]`.
        prompt: prompt numbers `[N]`, on the device.

    Returns:
        The next states and the guided outputs, both `[N, C, H, W]`.
    """
    row = table.rows(torch.full((len(x),), step, device=x.device), x)
    output = policy(x, row.timestep, prompt)
    return ops.guided_step(output, x, noise, row, guidance_scale=policy.guidance_scale)


@torch.no_grad()
def sample(
    policy: Policy,
    table: TransitionTable,
    prompt: Tensor,
    seeds: list[int],
    sample_shape: tuple[int, ...],
    *,
    batch: int | None = None,
    buffer: Recorder | None = None,
    slots: Tensor | None = None,
    final_noise: bool = True,
    on_step: Callable[[int], None] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sample N trajectories. Returns the finished latents x_T `[N, C, H, W]`, float32.

    Args:
        policy: the policy that samples.
        table: the sampler.
        prompt: prompt numbers `[N]`, on the CPU.
        seeds: N seeds. They fix x_0 and all noise, whatever `batch` is.
        sample_shape: (C, H, W) of the latents.
        batch: trajectories sampled together; None for all.
        buffer: receives each step and stores the drawn ones.
        slots: the trajectories' slots `[N]` in the buffer.
        final_noise: whether the last step of a sampler that `ends_at_prediction` adds its noise. Training needs it, because the
            loss has the step's density; an evaluation takes the mean.
        on_step: called after each step with the number of trajectories that took it.
        backend: computes the steps; see `fastnabla.objective.backend`.
    """
    device = policy.conditions.device
    ops = select(backend, device)
    noisy_steps = len(table) - (table.ends_at_prediction and not final_noise)
    finished = []
    for part in torch.arange(len(prompt)).split(batch or len(prompt)):
        policy.conditions.ensure(prompt[part])
        rows = prompt[part].to(device)
        noise = TrajectoryNoise([seeds[i] for i in part.tolist()], sample_shape, device)
        x = noise.draw()
        for step in range(len(table)):
            z = noise.draw() if step < noisy_steps else torch.zeros_like(x)
            x_next, o = advance(policy, table, ops, step, x, z, rows)
            if buffer is not None:
                buffer.append(slots[part], step, x, o, x_next)
            x = x_next
            if on_step:
                on_step(len(part))
        finished.append(x)
    return torch.cat(finished)
