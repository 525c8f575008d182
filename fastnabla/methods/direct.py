"""The training step of methods that take the reward's gradient through the sampler: ReFL, DRaFT-K, DRaFT-LV.

All maximise ``E[r(x_T)]`` itself. They differ in how much of the sampler the gradient passes through. x_i is the state
before step i of T; [brackets] carry no gradient:

| ending                                | rewarded latents                                                     | U per trajectory |
|---------------------------------------|----------------------------------------------------------------------|------------------|
| `late_prediction` (ReFL)              | x̂0([x_i]) = c [x_i] + d o_θ([x_i]), i uniform among the late steps   | i + 2            |
| `last_steps` (DRaFT-K)                | x_T, by x' = a x + b o_θ(x) + σ ε from [x_{T−K}] on                  | T + K            |
| `last_step_redrawn` (DRaFT-LV)        | x', from n draws of x ~ q(x_{T−1} given [x_T])                       | T + 2 n          |

ReFL is from Xu et al., arXiv 2304.05977, algorithm 1. Here their map φ of the reward is the identity, and there is no
pretraining loss. DRaFT is from Clark et al., arXiv 2309.17400, sections 3 and 3.2. DRaFT-LV noises the finished sample
back to the noise level of the last step's state with DDPM's noising kernel, for any η of the sampler, because DDIM's
marginals do not depend on η. Each of the n redraws then samples the last step again.

The loss is ``−mean r``. The decoder's graph is never joined to the UNet's: ∂r/∂x is computed in chunks of images, and one
backward pass carries it into the sampler. So the memory is that of K (or n) UNet graphs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnabla.methods.accumulation import Accumulation, Part, PartResult, Parts, StepReport
from fastnabla.methods.zero_gradients import DRIVE, REWARD_GRADIENT, largest
from fastnabla.models.decoder import Decoder, RewardFunction
from fastnabla.models.policy import Policy
from fastnabla.objective.gaussian import guide
from fastnabla.objective.noising import renoise
from fastnabla.objective.ops import PLAIN, ObjectiveOps
from fastnabla.objective.settings import Backend
from fastnabla.trajectories.rollout import advance
from fastnabla.trajectories.sources import Trajectories
from fastnabla.transition import TransitionTable
from fastnabla.utils.seeding import TrajectoryNoise


class Sampling:
    """n trajectories that are being sampled.

    Args:
        policy, table: the sampler.
        ops: computes the steps without gradient.
        trajectories: their prompts and seeds.
        sample_shape: (C, H, W) of the latents.
    """

    def __init__(
        self,
        policy: Policy,
        table: TransitionTable,
        ops: ObjectiveOps,
        trajectories: Trajectories,
        sample_shape: tuple[int, ...],
    ) -> None:
        device = policy.conditions.device
        self.policy, self.table, self.ops = policy, table, ops
        self.draws, self.prompt = trajectories.draws, trajectories.prompt.to(device)
        self.noise = TrajectoryNoise(list(trajectories.noise), sample_shape, device)
        self.x, self.step = self.noise.draw(), 0

    def walk(self, until: int, gradient: bool = False) -> None:
        """Advance to the state before step `until`."""
        with torch.set_grad_enabled(gradient):
            while self.step < until:
                ops = PLAIN if gradient else self.ops
                arguments = (self.policy, self.table, ops, self.step, self.x, self.noise.draw(), self.prompt)
                self.x, self.step = advance(*arguments)[0], self.step + 1

    @torch.no_grad()
    def walk_each(self, until: Tensor) -> None:
        """Advance each trajectory to the state before its own step, `until [n]` int64 on the host."""
        for step in range(int(until.max())):
            noise = self.noise.draw()
            rows = torch.where(until > step)[0].to(self.x.device, non_blocking=True)
            arguments = (self.policy, self.table, self.ops, step, self.x[rows], noise[rows], self.prompt[rows])
            self.x = self.x.index_copy(0, rows, advance(*arguments)[0])


Ending = Callable[[Sampling], Tensor]
"""Finishes the sampling and returns the rewarded latents with their graph, `[m n, C, H, W]`: m times all n trajectories."""


def last_steps(k: int) -> Ending:
    """DRaFT-K: the finished samples, with a gradient through the last `k` steps."""

    def ending(sampling: Sampling) -> Tensor:
        num_steps = len(sampling.table)
        sampling.walk(num_steps - k)
        sampling.walk(num_steps, gradient=True)
        return sampling.x

    return ending


def last_step_redrawn(redraws: int) -> Ending:
    """DRaFT-LV: the last step, from `redraws` states that are redrawn from the finished sample."""

    def ending(sampling: Sampling) -> Tensor:
        last, noise = len(sampling.table) - 1, sampling.noise
        sampling.walk(last + 1)
        row = sampling.table.rows(torch.full((len(sampling.x),), last, device=sampling.x.device), sampling.x)
        x = torch.cat([renoise(sampling.x, noise.draw(), row) for _ in range(redraws)])
        steps = torch.cat([noise.draw() for _ in range(redraws)])
        return advance(sampling.policy, sampling.table, PLAIN, last, x, steps, sampling.prompt.repeat(redraws))[0]

    return ending


def late_prediction(first: int) -> Ending:
    """ReFL: the clean sample predicted at a step drawn uniformly from `first` on, independently for each trajectory."""

    def ending(sampling: Sampling) -> Tensor:
        policy, num_steps = sampling.policy, len(sampling.table)
        stops = torch.tensor([late_step(seed, first, num_steps) for seed in sampling.draws])
        sampling.walk_each(stops)
        x = sampling.x
        row = sampling.table.rows(stops.to(x.device, non_blocking=True), x)
        output = policy(x, row.timestep, sampling.prompt)
        return row.c * x + row.d * guide(output, policy.guidance_scale)

    return ending


def late_step(seed: int, first: int, num_steps: int) -> int:
    """A step from `first` to `num_steps` − 1, drawn uniformly by `seed`."""
    return int(torch.randint(first, num_steps, (), generator=torch.Generator().manual_seed(seed)))


class DirectStep(Accumulation):
    """Samples trajectories and accumulates the gradients of their rewards.

    Its reports have the loss "reward". By row they have the "reward" whose gradient is taken, "norm_reward", which is ‖∇r‖
    in the latents, and, on the host, "prompt". U is by "trajectory".

    Args:
        policy, decoder, reward, prompts, table, micro_batch, backend: as for `fastnabla.methods.nabla_db.BalanceStep`; a
            micro-batch consists of trajectories.
        sample_shape: (C, H, W) of the latents.
        ending: what is rewarded, and how far the gradient goes.
    """

    kinds = ("trajectory",)

    def __init__(
        self,
        policy: Policy,
        decoder: Decoder,
        reward: RewardFunction,
        prompts: Sequence[str],
        table: TransitionTable,
        sample_shape: tuple[int, ...],
        ending: Ending,
        micro_batch: int,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(policy, None, micro_batch, backend)
        self.decoder, self.reward, self.prompts, self.table = decoder, reward, prompts, table
        self.sample_shape, self.ending = sample_shape, ending

    def __call__(self, trajectories: Trajectories, total: int | None = None) -> StepReport:
        """Add the gradients of ``−mean r`` over `trajectories` to the parameters' `.grad`.

        Args:
            trajectories: to sample with the current policy.
            total: divisor of the sums over trajectories, if the batch is split over several calls.

        Raises:
            torch.OutOfMemoryError: not even one trajectory at a time fits.
        """
        total = total or self.world.sum(len(trajectories))
        parts = Parts(self, len(trajectories), _cut)
        for part in parts:
            parts.add(self._attempt(len(part.rows), self.gradients, trajectories[part.rows], total))
        return parts.report()

    def gradients(self, trajectories: Trajectories, total: int) -> PartResult:
        """The gradients of one part of the trajectories, whose sums are divided by `total`."""
        sampling = Sampling(self.policy, self.table, self.ops, trajectories, self.sample_shape)
        latents = self.ending(sampling)
        times = len(latents) // len(trajectories)
        texts = [self.prompts[i] for i in trajectories.prompt.tolist()] * times
        rewards, score = self.decoder.reward_gradient(latents.detach(), texts, self.reward)
        gradients = self._differentiate(-(latents * score).sum() / (total * times))
        by_row = rewards.view(times, -1).mean(0)
        norm_reward = score.flatten(1).norm(dim=1).view(times, -1).mean(0)
        rows = {"reward": by_row, "norm_reward": norm_reward, "prompt": trajectories.prompt}
        return PartResult(gradients=gradients, losses={"reward": -by_row.sum() / total}, rows=rows)

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        rewards = rows["reward"]
        std = rewards.std(correction=min(1, len(rewards) - 1))
        return {"rollout_reward": rewards.mean(), "rollout_reward_std": std, "norm_reward": rows["norm_reward"].mean()}

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict.fromkeys((DRIVE, REWARD_GRADIENT), largest(rows["norm_reward"]))


def _cut(rows: Tensor, size: int) -> list[Part]:
    return [Part(rows=part, kind="trajectory") for part in rows.split(size)]
