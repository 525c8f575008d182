"""The training step of DAG-DB (arXiv 2406.00633): detailed balance with a learned flow (`objective/detailed_balance.py`).

| pass                        | inner | last  |
|-----------------------------|-------|-------|
| policy at x                 | 1     | 1     |
| policy at x', no gradient   | 1     |       |
| backward to the parameters  | 1     | 1     |
| **U**                       | **3** | **2** |

An inner transition takes two decodes without backward, for the rewards of its two predictions. A last one takes one, for
x̂0(x), and uses the stored reward of its trajectory.
"""

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastnabla.methods.accumulation import Accumulation, PartResult, Parts, StepReport
from fastnabla.methods.micro_batches import MicroBatch, cut
from fastnabla.methods.rollout_plan import ONE_UPDATE, RolloutPlan
from fastnabla.methods.zero_gradients import DRIVE, largest
from fastnabla.models.decoder import Decoder, RewardFunction
from fastnabla.models.policy import Policy
from fastnabla.objective.balance import mean_square
from fastnabla.objective.detailed_balance import balance_residual, log_flow
from fastnabla.objective.gaussian import full, guide
from fastnabla.objective.noising import check_is_ddpm, noising_log_prob
from fastnabla.objective.settings import Backend, Objective
from fastnabla.trajectories.transitions import LazyTransitions, Transitions
from fastnabla.transition import TransitionTable


class DetailedBalanceStep(Accumulation):
    """Accumulates the gradients of DAG-DB over batches of transitions, which hold the rewards of their trajectories.

    Its reports have the losses "balance" and "trust_region". By row they have the "residual" δ, "step_index" and, on the
    host, "prompt". The statistic "residual" is the root mean square; "beta" is there if β is annealed. U is by "inner" and
    "last" transition.

    Args:
        policy, decoder, reward, prompts, table, micro_batch, backend: as for `fastnabla.methods.nabla_db.BalanceStep`.
        flow: the network whose mean over elements is h_φ.
        objective: its β with schedule, γ and κ.
        plan: the run's rollouts and updates, which an annealed β depends on.

    Raises:
        ValueError: the sampler's steps are not DDPM's.
    """

    method = "dag"
    """Its name in messages."""

    def __init__(
        self,
        policy: Policy,
        flow: nn.Module,
        decoder: Decoder,
        reward: RewardFunction,
        prompts: Sequence[str],
        table: TransitionTable,
        objective: Objective,
        micro_batch: int,
        backend: Backend = "auto",
        plan: RolloutPlan = ONE_UPDATE,
    ) -> None:
        super().__init__(policy, flow, micro_batch, backend)
        check_is_ddpm(table, self.method)
        self.decoder, self.reward, self.prompts, self.table = decoder, reward, prompts, table
        self.objective, self.plan = objective, plan

    def __call__(self, transitions: Transitions | LazyTransitions, total: int | None = None) -> StepReport:
        """Add the gradients of the mean loss over `transitions` to the parameters' `.grad`.

        Args:
            transitions: in any order.
            total: divisor of the sums over transitions, if the batch is split over several calls.

        Raises:
            torch.OutOfMemoryError: not even one transition at a time fits.
        """
        selection = transitions.select() if isinstance(transitions, Transitions) else transitions
        total = total or self.world.sum(len(selection))
        parts = Parts(self, len(selection), functools.partial(cut, selection, len(self.table)))
        for part in parts:
            parts.add(self._attempt(len(part.rows), self.gradients, part, total))
        return parts.report()

    def gradients(self, part: MicroBatch, total: int) -> PartResult:
        """The gradients of one micro-batch, whose sums are divided by `total`."""
        batch, w = part.gather(), self.policy.guidance_scale
        row = self.table.rows(batch.step_index, batch.x)
        reward_next = self._reward_at_next(part, batch)
        output = self.policy(batch.x, row.timestep, batch.prompt)
        o = guide(output, w)
        log_prob = self.ops.gaussian_log_prob(output, batch.x, batch.x_next, row, guidance_scale=w)
        residual = self._residual(part, batch, o, log_prob, reward_next)
        terms = {"balance": residual.square(), "trust_region": self._trust_region(batch, o)}
        return PartResult(
            gradients=self._differentiate(sum(values.sum() for values in terms.values()) / total),
            losses={name: values.detach().sum() / total for name, values in terms.items()},
            rows={"residual": residual.detach(), "step_index": batch.step_index, "prompt": part.selection.prompt},
        )

    @torch.no_grad()
    def _reward_at_next(self, part: MicroBatch, batch: Transitions) -> Tensor:
        """r(x̂0(x')) `[n]`; of last transitions the reward of the sample."""
        if part.last:
            return batch.reward
        row = self.table.rows(batch.step_index, batch.x)
        o = guide(self.policy(batch.x_next, row.timestep_next, batch.prompt), self.policy.guidance_scale)
        return self.decoder.rewards(row.c_next * batch.x_next + row.d_next * o, self._texts(part), self.reward)

    def _residual(
        self, part: MicroBatch, batch: Transitions, o: Tensor, log_prob: Tensor, reward_next: Tensor
    ) -> Tensor:
        """δ `[n]`, from the policy's guided output at x, its log-density and the reward at x'."""
        row, elements = self.table.rows(batch.step_index, batch.x), batch.x[0].numel()
        reward = self.decoder.rewards(row.c * batch.x + row.d * o.detach(), self._texts(part), self.reward)
        flow, flow_next = self._flows(batch, part.last)
        objective = dataclasses.replace(self.objective, beta=self._beta())
        return balance_residual(
            log_flow(reward, flow, row.alpha_bar, elements, objective=objective),
            log_prob,
            log_flow(reward_next, flow_next, row.alpha_bar_next, elements, objective=objective),
            noising_log_prob(batch.x, batch.x_next, row),
            elements,
        )

    def _trust_region(self, batch: Transitions, o: Tensor) -> Tensor:
        """κ times the squared distance to the stored outputs, `[n]`."""
        return self.objective.trust_region_weight * mean_square(o - full(batch.model_output))

    def _beta(self) -> float:
        """β of this update."""
        objective = self.objective
        return objective.beta * (self.plan.annealing(self.update) if objective.beta_schedule == "linear" else 1)

    def _texts(self, part: MicroBatch) -> list[str]:
        return [self.prompts[i] for i in part.selection.prompt.tolist()]

    def _flows(self, batch: Transitions, last: bool) -> tuple[Tensor, Tensor | None]:
        """The flow network at x and, except at finished samples, at x', in one call."""
        row = self.table.rows(batch.step_index, batch.x)
        if last:
            return self._flow_values(batch.x, row.timestep, batch.prompt), None
        states, timesteps = torch.cat([batch.x, batch.x_next]), torch.cat([row.timestep, row.timestep_next])
        return self._flow_values(states, timesteps, batch.prompt.repeat(2)).chunk(2)

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        residual = rows["residual"].square().mean().sqrt()
        annealed = {"beta": torch.tensor(self._beta())} if self.objective.beta_schedule == "linear" else {}
        return {"residual": residual} | annealed

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {DRIVE: largest(rows["residual"])}
