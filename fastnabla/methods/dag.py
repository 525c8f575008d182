"""The training step of DAG-DB (arXiv 2406.00633): detailed balance with a learned flow; `fastnabla.objective.detailed_balance`.

| pass                        | inner | last  |
|-----------------------------|-------|-------|
| policy at x                 | 1     | 1     |
| policy at x', no gradient   | 1     |       |
| backward to the parameters  | 1     | 1     |
| **U**                       | **3** | **2** |

An inner transition has two decodes, forward alone, for the rewards of its two predictions; a last one has another for
x̂0(x), and its trajectory's stored reward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastnabla.methods.accumulation import Accumulation, Share, StepReport
from fastnabla.methods.micro_batches import MicroBatch, cut
from fastnabla.methods.zero_gradients import DRIVE, largest
from fastnabla.models.decoder import Decoder, RewardFunction
from fastnabla.models.policy import Policy
from fastnabla.objective.balance import mean_square
from fastnabla.objective.detailed_balance import balance_residual, log_flow
from fastnabla.objective.gaussian import full, guide
from fastnabla.objective.noising import check_is_ddpm, noising_log_prob
from fastnabla.objective.settings import Backend, Objective
from fastnabla.trajectories.transitions import Selection, Transitions
from fastnabla.transition import TransitionTable


class DetailedBalanceStep(Accumulation):
    """Accumulates the gradients of DAG-DB over batches of transitions, which hold their trajectory's reward.

    Its reports have the losses "balance" and "trust_region", by row the "residual" δ, "step_index" and, on the host,
    "prompt", as statistic the root mean square residual, and U by "inner" and "last" transition.

    Args:
        policy, decoder, reward, prompts, table, micro_batch, backend: as for `fastnabla.methods.nabla_db.BalanceStep`.
        flow: the network whose mean over elements is h_φ.
        objective: its β, γ and κ.

    Raises:
        ValueError: the sampler's steps are not DDPM's.
    """

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
    ) -> None:
        super().__init__(policy, flow, micro_batch, backend)
        check_is_ddpm(table, "dag")
        self.decoder, self.reward, self.prompts, self.table = decoder, reward, prompts, table
        self.objective = objective

    def __call__(self, transitions: Transitions | Selection, total: int | None = None) -> StepReport:
        """Add the gradients of the mean loss over `transitions` to the parameters' `.grad`.

        Args:
            transitions: in any order.
            total: what sums over transitions are divided by, if the batch goes on in other calls.

        Raises:
            torch.OutOfMemoryError: not even one transition at a time fits.
        """
        selection = transitions.select() if isinstance(transitions, Transitions) else transitions
        total, num_steps = total or self.world.sum(len(selection)), len(self.table)
        return self._accumulate(
            len(selection),
            lambda rows, size: [part.of(rows) for part in cut(selection[rows], num_steps, size, share=False)],
            lambda micro: self._share(selection, micro, total),
        )

    def _share(self, selection: Selection, micro: MicroBatch, total: int) -> Share:
        batch, w, objective = selection.gather(micro.rows), self.policy.guidance_scale, self.objective
        texts = [self.prompts[i] for i in selection.prompt[micro.rows].tolist()]
        row, elements = self.table.rows(batch.step_index, batch.x), batch.x[0].numel()
        reward_next = batch.reward if micro.last else self._reward_after(batch, texts)

        output = self.policy(batch.x, row.timestep, batch.prompt)
        o = guide(output, w)
        reward = self.decoder.rewards(row.c * batch.x + row.d * o.detach(), texts, self.reward)
        flow, flow_next = self._flows(batch, micro.last)
        residual = balance_residual(
            log_flow(reward, flow, row.alpha_bar, elements, objective=objective),
            self.ops.gaussian_log_prob(output, batch.x, batch.x_next, row, guidance_scale=w),
            log_flow(reward_next, flow_next, row.alpha_bar_next, elements, objective=objective),
            noising_log_prob(batch.x, batch.x_next, row),
            elements,
        )
        parts = {
            "balance": residual.square(),
            "trust_region": self.objective.trust_region_weight * mean_square(o - full(batch.model_output)),
        }
        gradients = self._gradients(sum(part.sum() for part in parts.values()) / total)
        losses = {name: part.detach().sum() / total for name, part in parts.items()}
        prompt = selection.prompt[micro.rows]
        rows = {"residual": residual.detach(), "step_index": batch.step_index, "prompt": prompt}
        return Share(gradients=gradients, losses=losses, rows=rows)

    @torch.no_grad()
    def _reward_after(self, batch: Transitions, texts: list[str]) -> Tensor:
        """r(x̂0(x')) `[n]` of inner transitions."""
        row = self.table.rows(batch.step_index, batch.x)
        o = guide(self.policy(batch.x_next, row.timestep_next, batch.prompt), self.policy.guidance_scale)
        return self.decoder.rewards(row.c_next * batch.x_next + row.d_next * o, texts, self.reward)

    def _flows(self, batch: Transitions, last: bool) -> tuple[Tensor, Tensor | None]:
        """The flow network at x and, but for finished samples, at x'; one call."""
        row = self.table.rows(batch.step_index, batch.x)
        if last:
            return self._flow_values(batch.x, row.timestep, batch.prompt), None
        states, timesteps = torch.cat([batch.x, batch.x_next]), torch.cat([row.timestep, row.timestep_next])
        return self._flow_values(states, timesteps, batch.prompt.repeat(2)).chunk(2)

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"residual": rows["residual"].square().mean().sqrt()}

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {DRIVE: largest(rows["residual"])}
