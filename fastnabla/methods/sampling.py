"""What the methods share that sample their trajectories within the training step: the sampling, and a step's frame."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnabla.methods.accumulation import Accumulation, Part, PartResult, Parts, StepReport
from fastnabla.models.decoder import Decoder, RewardFunction
from fastnabla.models.policy import Policy
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
        self.draws, self.shared = trajectories.draws, trajectories.shared
        self.prompt = trajectories.prompt.to(device)
        self.noise = TrajectoryNoise(list(trajectories.noise), sample_shape, device)
        self.x, self.step = self.noise.draw(), 0

    def walk(self, until: int, gradient: bool = False) -> None:
        """Advance to the state before step `until`."""
        while self.step < until:
            self.take(gradient)

    def take(self, gradient: bool = False) -> Tensor:
        """Take one step. Returns its guided outputs `[n, C, H, W]`."""
        ops = PLAIN if gradient else self.ops
        with torch.set_grad_enabled(gradient):
            arguments = (self.policy, self.table, ops, self.step, self.x, self.noise.draw(), self.prompt)
            self.x, output = advance(*arguments)
        self.step += 1
        return output

    def states(self) -> Tensor:
        """Finish the sampling, and return all states from the present one on, `[T + 1, n, C, H, W]` from x_0."""
        states = [self.x]
        while self.step < len(self.table):
            self.walk(self.step + 1)
            states.append(self.x)
        return torch.stack(states)

    @torch.no_grad()
    def walk_each(self, until: Tensor) -> None:
        """Advance each trajectory to the state before its own step, `until [n]` int64 on the host."""
        for step in range(int(until.max())):
            noise = self.noise.draw()
            rows = torch.where(until > step)[0].to(self.x.device, non_blocking=True)
            arguments = (self.policy, self.table, self.ops, step, self.x[rows], noise[rows], self.prompt[rows])
            self.x = self.x.index_copy(0, rows, advance(*arguments)[0])


class SamplingStep(Accumulation):
    """Samples trajectories with the current policy and accumulates the gradients of a loss on them.

    A subclass computes one part of the trajectories in `gradients`. U is by "trajectory".

    Args:
        policy, decoder, reward, prompts, table, micro_batch, backend: as for `fastnabla.methods.nabla_db.BalanceStep`; a
            micro-batch consists of trajectories.
        sample_shape: (C, H, W) of the latents.
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
        micro_batch: int,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(policy, None, micro_batch, backend)
        self.decoder, self.reward, self.prompts, self.table = decoder, reward, prompts, table
        self.sample_shape = sample_shape

    def __call__(self, trajectories: Trajectories, total: int | None = None) -> StepReport:
        """Add the gradients of the mean loss over `trajectories` to the parameters' `.grad`.

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
        raise NotImplementedError

    def _sampling(self, trajectories: Trajectories) -> Sampling:
        """Start to sample `trajectories`."""
        return Sampling(self.policy, self.table, self.ops, trajectories, self.sample_shape)

    def _reward_gradient(self, latents: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards `[n]` of `latents [n, C, H, W]` with the prompt numbers `prompt [n]`, and the gradients in the latents."""
        return self.decoder.reward_gradient(latents, [self.prompts[i] for i in prompt.tolist()], self.reward)


def _cut(rows: Tensor, size: int) -> list[Part]:
    return [Part(rows=part, kind="trajectory") for part in rows.split(size)]
