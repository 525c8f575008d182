"""The training step of DDPO (Black et al., arXiv 2305.13301): policy gradients of stored transitions, 2 U each.

The objective is ``E[r(x_T)]``. The estimate is the mean of the clipped surrogate (`fastnabla.objective.policy_gradient`)
over trajectories and all T steps, with each drawn step weighted by the inverse of how often it is drawn. Advantages are
normalised by prompt over a window of rewards. Only values of the reward are used, never its gradient.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastnabla.config.method_sections import PolicyGradient
from fastnabla.methods.accumulation import Accumulation, PartResult, Parts, StepReport
from fastnabla.methods.micro_batches import MicroBatch, cut
from fastnabla.methods.zero_gradients import DRIVE, largest
from fastnabla.models.policy import Policy
from fastnabla.objective.policy_gradient import clipped_surrogate, is_clipped, is_flat
from fastnabla.objective.settings import Backend
from fastnabla.trajectories.transitions import LazyTransitions, Transitions
from fastnabla.transition import TransitionTable

SMALLEST_STD = 1e-6


class PromptStatistics:
    """The latest rewards of each prompt, on the host. Normalising by them makes advantages comparable between prompts.

    Args:
        prompts: number of prompts.
        window: number of rewards kept for each.
        min_count: a prompt with at least this many rewards is normalised by its own.
    """

    def __init__(self, prompts: int, window: int, min_count: int) -> None:
        self.min_count = min_count
        self.rewards = torch.full((prompts, window), float("nan"), dtype=torch.float64)
        self.seen = torch.zeros(prompts, dtype=torch.int64)

    def advantages(self, prompt: Tensor, reward: Tensor, again: bool = False) -> Tensor:
        """Record rewards and return their advantages, ``(reward − mean) / std``, `[n]` float64.

        Mean and standard deviation are those of the prompt's latest rewards, or of `reward` while the prompt has fewer than
        `min_count`.

        Args:
            prompt: prompt numbers `[n]` int64.
            reward: rewards `[n]` of their samples.
            again: whether the rewards have been recorded already; they are then not recorded again.
        """
        reward = reward.double()
        for number, value in zip(prompt.tolist(), reward.tolist(), strict=True) if not again else ():
            self.rewards[number, self.seen[number] % self.rewards.shape[1]] = value
            self.seen[number] += 1
        kept = self.rewards[prompt]
        there = ~kept.isnan()
        count = there.sum(1)
        mean = kept.nansum(1) / count
        std = ((kept - mean[:, None]).square().nansum(1) / count).sqrt()
        few = count < self.min_count
        mean = torch.where(few, reward.mean(), mean)
        std = torch.where(few, reward.std(correction=0), std)
        return (reward - mean) / (std + SMALLEST_STD)

    def state_dict(self) -> dict[str, Any]:
        """The rewards."""
        return {"rewards": self.rewards, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state is for another number of prompts or another window.
        """
        if state["rewards"].shape != self.rewards.shape:
            raise ValueError(f"rewards of {tuple(state['rewards'].shape)}, expected {tuple(self.rewards.shape)}")
        self.rewards.copy_(state["rewards"])
        self.seen.copy_(state["seen"])


class PolicyGradientStep(Accumulation):
    """Accumulates policy gradients over batches of transitions, which hold the rewards of their trajectories.

    Its reports have the loss "surrogate". By row they have "ratio", "advantage", "step_index" and, on the host, "prompt". The
    statistics are the mean "ratio" and the fraction "clipped", outside 1 ± ε. U is by "inner" and "last" transition. Each
    call waits for the device once, to read the rewards.

    Args:
        policy, table, micro_batch, backend: as for `fastnabla.methods.nabla_db.BalanceStep`.
        prompts: number of prompts.
        settings: clipping and normalisation.
        expected: how often a trajectory keeps each step, `[T]`; see `fastnabla.trajectories.draws.expected_draws`.
    """

    def __init__(
        self,
        policy: Policy,
        table: TransitionTable,
        prompts: int,
        settings: PolicyGradient,
        expected: Tensor,
        micro_batch: int,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(policy, None, micro_batch, backend)
        self.table, self.settings = table, settings
        self.weight = 1 / expected
        self.statistics = PromptStatistics(prompts, settings.window, settings.min_count)

    def __call__(self, transitions: Transitions | LazyTransitions, total: int | None = None) -> StepReport:
        """Add the gradients of the surrogate's mean over trajectories and steps to the parameters' `.grad`.

        Args:
            transitions: of whole trajectories, in any order. Where the reward is not finite, the advantage is 0; if no reward is
                finite, all advantages and the loss are nan.
            total: divisor of the sum over trajectories, if the batch is split over several calls.

        Raises:
            ValueError: no trajectory has a reward: all are nan.
            torch.OutOfMemoryError: not even one transition at a time fits.
        """
        selection = transitions.select() if isinstance(transitions, Transitions) else transitions
        num_steps = len(self.table)
        trajectories, advantage = self._advantages(selection)
        scale = self.weight[selection.step_index] / ((total or trajectories) * num_steps)
        parts = Parts(self, len(selection), functools.partial(cut, selection, num_steps))
        for part in parts:
            parts.add(self._attempt(len(part.rows), self.gradients, part, advantage[part.rows], scale[part.rows]))
        return parts.report()

    def _advantages(self, selection: LazyTransitions) -> tuple[int, Tensor]:
        """Number of trajectories on all ranks, and the clipped advantage of each transition, `[M]` on the host."""
        slots, place = selection.trajectory.unique(return_inverse=True)
        one = torch.empty(len(slots), dtype=torch.int64)
        one[place] = torch.arange(len(place))
        rewards = torch.cat([selection.gather(rows).reward.cpu() for rows in one.split(self.micro_batch)])
        own, count = self.world.span(len(slots))
        rewards = self.world.all_gather_rows(rewards, own, count)
        prompts = self.world.all_gather_rows(selection.prompt[one], own, count)
        if bool(rewards.isnan().all()):
            raise ValueError("no trajectory has a reward: set buffer.reward before a policy gradient.")
        finite = rewards.isfinite()
        limit, advantage = self.settings.advantage_clip, torch.zeros_like(rewards, dtype=torch.float64)
        if bool(finite.any()):
            advantage[finite] = self.statistics.advantages(prompts[finite], rewards[finite], selection.again)
        else:
            advantage[:] = math.nan  # so is the loss, and the caller does not apply such an update
        return count, advantage.clamp(-limit, limit)[own][place].float()

    def gradients(self, part: MicroBatch, advantage: Tensor, scale: Tensor) -> PartResult:
        """The gradients of one micro-batch, with the advantage and the weight of each transition, `[n]` on the host."""
        batch, w = part.gather(), self.policy.guidance_scale
        row, states = self.table.rows(batch.step_index, batch.x), (batch.x, batch.x_next)
        advantage, scale = (numbers.to(batch.x.device, non_blocking=True) for numbers in (advantage, scale.float()))
        output = self.policy(batch.x, row.timestep, batch.prompt)
        log_prob = self.ops.gaussian_log_prob(output, *states, row, guidance_scale=w)
        log_prob_old = self.ops.gaussian_log_prob(batch.model_output, *states, row, guidance_scale=None)
        log_ratio = (log_prob - log_prob_old) / batch.x[0].numel()
        loss = (scale * clipped_surrogate(log_ratio, advantage, self.settings.clip)).sum()
        rows = {"ratio": log_ratio.detach().exp(), "advantage": advantage, "step_index": batch.step_index}
        rows["prompt"] = part.selection.prompt
        return PartResult(gradients=self._differentiate(loss), losses={"surrogate": loss.detach()}, rows=rows)

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        clipped = is_clipped(rows["ratio"], self.settings.clip)
        return {"ratio": rows["ratio"].mean(), "clipped": clipped.float().mean()}

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The advantages of rows that have a gradient."""
        flat = is_flat(rows["ratio"], rows["advantage"], self.settings.clip)
        return {DRIVE: largest(rows["advantage"].masked_fill(flat, 0))}

    def state_dict(self) -> dict[str, Any]:
        """The rewards that advantages are normalised by."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.statistics.load_state_dict(state)
