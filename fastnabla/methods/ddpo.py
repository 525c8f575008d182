"""The training step of DDPO (Black et al., arXiv 2305.13301): policy gradients of stored transitions, 2 U each.

The objective is ``E[r(x_T)]``, its estimate the mean over trajectories and all T steps of the clipped surrogate
(`fastnabla.objective.policy_gradient`), each drawn step weighted by the inverse of how often it is drawn. Advantages are
normalised by prompt over a window of rewards. The reward is asked for values alone, never for a gradient.
"""

from typing import Any

import torch
from torch import Tensor

from fastnabla.methods.accumulation import Accumulation, Share, StepReport
from fastnabla.methods.micro_batches import MicroBatch, cut
from fastnabla.methods.prompt_statistics import PromptStatistics
from fastnabla.methods.zero_gradients import DRIVE, largest
from fastnabla.models.policy import Policy
from fastnabla.objective.policy_gradient import PolicyGradient, clipped_surrogate
from fastnabla.objective.settings import Backend
from fastnabla.trajectories.transitions import Selection, Transitions
from fastnabla.transition import TransitionTable


class PolicyGradientStep(Accumulation):
    """Accumulates policy gradients over batches of transitions, which hold their trajectory's reward.

    Its reports have the loss "surrogate", by row "ratio", "advantage", "step_index" and, on the host, "prompt", as statistics
    the mean "ratio" and the share that is "clipped", and U by "inner" and "last" transition. Reading the rewards waits for
    the device, once a call.

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

    def __call__(self, transitions: Transitions | Selection, total: int | None = None) -> StepReport:
        """Add the gradients of the surrogate's mean over trajectories and steps to the parameters' `.grad`.

        Args:
            transitions: of whole trajectories, in any order. Where the reward is not finite, the advantage is 0.
            total: trajectories that the mean is over, if the batch goes on in other calls.

        Raises:
            ValueError: no trajectory has a reward.
            torch.OutOfMemoryError: not even one transition at a time fits.
        """
        selection = transitions.select() if isinstance(transitions, Transitions) else transitions
        num_steps = len(self.table)
        trajectories, advantage = self._advantages(selection)
        scale = self.weight[selection.step_index] / ((total or trajectories) * num_steps)
        return self._accumulate(
            len(selection),
            lambda rows, size: [part.of(rows) for part in cut(selection[rows], num_steps, size, share=False)],
            lambda micro: self._share(selection, micro, advantage[micro.rows], scale[micro.rows]),
        )

    def _advantages(self, selection: Selection) -> tuple[int, Tensor]:
        """Number of all ranks' trajectories, and the clipped advantage of each transition, `[M]` on the host."""
        slots, place = selection.trajectory.unique(return_inverse=True)
        one = torch.empty(len(slots), dtype=torch.int64)
        one[place] = torch.arange(len(place))
        rewards = torch.cat([selection.gather(rows).reward.cpu() for rows in one.split(self.micro_batch)])
        own, count = self.world.span(len(slots))
        rewards = self.world.all_gather_rows(rewards, own, count)
        prompts = self.world.all_gather_rows(selection.prompt[one], own, count)
        finite = rewards.isfinite()
        if not bool(finite.any()):
            raise ValueError("no trajectory has a finite reward: set buffer.reward before a policy gradient.")
        limit, advantage = self.settings.advantage_clip, torch.zeros_like(rewards, dtype=torch.float64)
        advantage[finite] = self.statistics.advantages(prompts[finite], rewards[finite], selection.again)
        return count, advantage.clamp(-limit, limit)[own][place].float()

    def _share(self, selection: Selection, micro: MicroBatch, advantage: Tensor, scale: Tensor) -> Share:
        batch, w = selection.gather(micro.rows), self.policy.guidance_scale
        row, states = self.table.rows(batch.step_index, batch.x), (batch.x, batch.x_next)
        advantage, scale = (numbers.to(batch.x.device, non_blocking=True) for numbers in (advantage, scale.float()))
        output = self.policy(batch.x, row.timestep, batch.prompt)
        log_prob = self.ops.gaussian_log_prob(output, *states, row, guidance_scale=w)
        log_prob_old = self.ops.gaussian_log_prob(batch.model_output, *states, row, guidance_scale=None)
        log_ratio = (log_prob - log_prob_old) / batch.x[0].numel()
        loss = (scale * clipped_surrogate(log_ratio, advantage, self.settings.clip)).sum()
        rows = {"ratio": log_ratio.detach().exp(), "advantage": advantage, "step_index": batch.step_index}
        rows["prompt"] = selection.prompt[micro.rows]
        return Share(gradients=self._gradients(loss), losses={"surrogate": loss.detach()}, rows=rows)

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        clipped = (rows["ratio"] - 1).abs() > self.settings.clip
        return {"ratio": rows["ratio"].mean(), "clipped": clipped.float().mean()}

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The advantages of rows that are not clipped, which have no gradient."""
        clipped = (rows["ratio"] - 1).abs() > self.settings.clip
        return {DRIVE: largest(rows["advantage"].masked_fill(clipped, 0))}

    def state_dict(self) -> dict[str, Any]:
        """The rewards that advantages are normalised by."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.statistics.load_state_dict(state)
