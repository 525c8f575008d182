"""Sampling with the current policy: rollouts that are stored to be learned from, and samples to evaluate."""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastnabla.config.train import TrainConfig
from fastnabla.distributed.signals import Stopped, StopSignals
from fastnabla.distributed.world import World
from fastnabla.models.decoder import Decoder
from fastnabla.models.policy import Policy
from fastnabla.prompts import RunPrompts, assign_prompts
from fastnabla.rewards import RewardSum
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.draws import DRAWS
from fastnabla.trajectories.finite_samples import finite_samples
from fastnabla.trajectories.reward_statistics import reward_statistics
from fastnabla.trajectories.rollout import sample
from fastnabla.transition import TransitionTable
from fastnabla.utils.seeding import seed_of


class Sampler:
    """Samples with the policy on all ranks, until a signal stops them all.

    Args:
        config: the run's.
        policy, table, sample_shape: see `fastnabla.trajectories.rollout.sample`.
        world: the ranks. Each samples its own trajectories.
    """

    def __init__(
        self, config: TrainConfig, policy: Policy, table: TransitionTable, sample_shape: tuple[int, ...], world: World
    ) -> None:
        self.config, self.policy, self.table, self.sample_shape = config, policy, table, sample_shape
        self.world = world
        self.stop = StopSignals()
        self.advance: Callable[[int], None] = lambda count: None
        """Called with the number of trajectories after each of their steps. May raise `Stopped`."""

    def __call__(
        self, prompt: Tensor, seeds: list[int], buffer: TrajectoryBuffer | None = None, slots: Tensor | None = None
    ) -> Tensor:
        """Sample finished latents `[n, C, H, W]`.

        Args:
            prompt: prompt numbers `[n]`.
            seeds: n seeds of the noise.
            buffer, slots: where to store the steps, and the trajectories' slots `[n]` in it. None for an evaluation, which leaves
                out the noise of a last step that only gives it a density.

        Raises:
            Stopped: a rank was asked to stop.
        """
        latents = None
        # Perhaps only this rank was asked to stop; `check` then stops all ranks.
        with contextlib.suppress(Stopped):
            latents = sample(
                self.policy,
                self.table,
                prompt,
                seeds,
                self.sample_shape,
                batch=self.config.rollout.batch,
                buffer=buffer,
                slots=slots,
                final_noise=buffer is not None,
                on_step=self.advance,
                backend=self.config.backend,
            )
        self.stop.check(self.world)
        return latents


class RolloutCollector:
    """Samples rollouts, rewards them, and stores their drawn steps.

    Args:
        sampler: samples the trajectories.
        decoder, reward, prompts: give the finished samples their rewards.
        buffer: this rank's.
        own: numbers of this rank's trajectories in a rollout, `[n]`.
    """

    def __init__(
        self,
        sampler: Sampler,
        decoder: Decoder,
        reward: RewardSum,
        prompts: RunPrompts,
        buffer: TrajectoryBuffer,
        own: Tensor,
    ) -> None:
        self.sampler, self.decoder, self.reward, self.prompts = sampler, decoder, reward, prompts
        self.buffer, self.own = buffer, own

    def __call__(self, rollout_index: int) -> dict[str, float]:
        """Sample a rollout with the current policy into the buffer. Returns statistics of all ranks' rewards."""
        config, own, world = self.sampler.config, self.own, self.sampler.world

        # Prompts, drawn steps and noise of each trajectory, by its number in the run.
        count = config.rollout.trajectories
        first = rollout_index * count
        prompt = assign_prompts(config.seed, first, count, self.prompts.trained, config.prompts.draw)
        draw, num_steps = DRAWS[config.rollout.draw], len(self.sampler.table)
        steps = draw(seed_of(config.seed, "draws"), first, count, num_steps, config.drawn_steps)
        seeds = [seed_of(config.seed, "noise", first + i) for i in own.tolist()]

        # Sample, decode, reward.
        slots = self.buffer.reserve(steps[own], prompt[own])
        latents = self.sampler(prompt[own], seeds, self.buffer, slots)
        texts = [self.prompts.texts[i] for i in prompt.tolist()]
        images = self.decoder.decode(latents)
        parts = self.reward.parts(images, [texts[i] for i in own.tolist()], config.memory.decode_chunk)

        # Samples that are not finite are left out of the statistics; their stored reward is inf.
        def of_all(values: Tensor) -> Tensor:
            return world.all_gather_rows(values, own, count)

        seen = {name: of_all(values) for name, values in parts.items()}
        finite = finite_samples(of_all(latents.flatten(1).abs().amax(1, keepdim=True)), seen, texts)
        sound = {name: values[finite.to(values.device)] for name, values in seen.items()}
        self.reward.observe(sound)
        shaped = self.reward.shape(parts)
        shaped = torch.where(finite[own].to(shaped.device), shaped, math.inf)
        self.buffer.reward[slots.to(shaped.device)] = shaped

        metrics = {name: value.item() for name, value in reward_statistics(self.reward.total(sound)).items()}
        return metrics | {f"rollout_reward_{name}": values.mean().item() for name, values in sound.items()}


def rank_ranges(world: World, trajectories: int, updates: int) -> list[range]:
    """This rank's trajectories of a rollout, as a range of consecutive numbers for each update.

    Args:
        world: the ranks.
        trajectories: of a rollout; a multiple of `updates`.
        updates: of a rollout.

    Raises:
        ValueError: an update has fewer trajectories than there are ranks.
    """
    each = trajectories // updates
    if each < world.size:
        raise ValueError(
            f"rollout.trajectories = {trajectories}: gives an update {each} trajectories, fewer than the "
            f"{world.size} processes; use at least {updates * world.size}, or fewer processes."
        )
    size, larger = divmod(each, world.size)
    first = world.rank * size + min(world.rank, larger)
    own = range(first, first + size + (world.rank < larger))
    return [range(start + own.start, start + own.stop) for start in range(0, trajectories, each)]
