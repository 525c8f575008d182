"""Trajectories of the policy as it is: rollouts, which are stored to be learned from, and samples to be evaluated."""

import contextlib
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
from fastnabla.trajectories.rollout import sample
from fastnabla.transition import TransitionTable
from fastnabla.utils.seeding import seed_of


class Sampler:
    """Samples with the policy, on all ranks, until a signal stops them all.

    Args:
        config: the run's.
        policy, table, sample_shape: what is sampled, see `fastnabla.trajectories.rollout.sample`.
        world: the ranks, each of which samples trajectories of its own.
    """

    def __init__(
        self, config: TrainConfig, policy: Policy, table: TransitionTable, sample_shape: tuple[int, ...], world: World
    ) -> None:
        self.config, self.policy, self.table, self.sample_shape = config, policy, table, sample_shape
        self.world = world
        self.stop = StopSignals()
        self.advance: Callable[[int], None] = lambda count: None
        """Told of so many steps of one trajectory each; may raise `Stopped`."""

    def __call__(
        self, prompt: Tensor, seeds: list[int], buffer: TrajectoryBuffer | None = None, slots: Tensor | None = None
    ) -> Tensor:
        """Finished latents `[n, C, H, W]` of prompt numbers `prompt [n]` and seeds of their noise; stored on the way, if
        there is a `buffer`, in its `slots [n]`.

        Raises:
            Stopped: a rank was asked to stop.
        """
        latents = None
        with contextlib.suppress(Stopped):  # here perhaps alone, so that all ranks are asked
            latents = sample(
                self.policy,
                self.table,
                prompt,
                seeds,
                self.sample_shape,
                batch=self.config.rollout.batch,
                buffer=buffer,
                slots=slots,
                on_step=self.advance,
                backend=self.config.backend,
            )
        self.stop.check(self.world)
        return latents


class Rollouts:
    """Samples rollouts into the buffer.

    Args:
        sampler: what samples.
        decoder, reward, prompts: what finished samples are rewarded by.
        buffer: of this rank.
        own: numbers `[n]` of this rank's trajectories of a rollout.
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

    def __call__(self, number: int) -> dict[str, float]:
        """Sample rollout `number` with the current policy, into the buffer; statistics of all ranks' rewards."""
        config, own, world = self.sampler.config, self.own, self.sampler.world
        count = config.rollout.trajectories
        first = number * count
        prompt = assign_prompts(config.seed, first, count, self.prompts.trained, config.prompts.draw)
        draw, num_steps = DRAWS[config.rollout.draw], len(self.sampler.table)
        steps = draw(seed_of(config.seed, "draws"), first, count, num_steps, config.drawn_steps)
        seeds = [seed_of(config.seed, "noise", first + i) for i in own.tolist()]
        slots = self.buffer.reserve(steps[own], prompt[own], epoch=number)
        latents = self.sampler(prompt[own], seeds, self.buffer, slots)
        texts = [self.prompts.texts[i] for i in prompt.tolist()]
        images = self.decoder.decode(latents)
        parts = self.reward.parts(images, [texts[i] for i in own.tolist()], config.memory.decode_chunk)

        def of_all(values: Tensor) -> Tensor:
            return world.all_gather_rows(values, own, count)

        seen = {name: of_all(values) for name, values in parts.items()}
        finite = finite_samples(of_all(latents.flatten(1).abs().amax(1, keepdim=True)), seen, texts)
        sound = {name: values[finite.to(values.device)] for name, values in seen.items()}
        rewards = self.reward.total(sound)
        self.reward.observe(sound)
        shaped = self.reward.shape(parts)
        shaped = torch.where(finite[own].to(shaped.device), shaped, float("nan"))
        self.buffer.reward[slots.to(shaped.device)] = shaped
        metrics = {"rollout_reward": rewards.mean().item(), "rollout_reward_std": rewards.std().item()}
        return metrics | {f"rollout_reward_{name}": values.mean().item() for name, values in sound.items()}


def rank_ranges(world: World, trajectories: int, updates: int) -> list[range]:
    """Numbers of this rank's trajectories among those of a rollout, by update: of each update's, consecutive ones.

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
