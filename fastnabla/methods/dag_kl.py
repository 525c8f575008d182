"""The training step of DAG-KL (arXiv 2406.00633): a policy gradient of detailed balance (`objective/detailed_balance.py`).

δ is the residual of detailed balance, per element. A batch is passed twice:

1. The flow is trained with δ², where log P_θ carries no gradient. The return of each transition is R = −δ.
2. The policy is trained with the clipped surrogate of the advantages of R (`objective/policy_gradient.py`). They are
   normalised over all transitions of the update on all ranks, so they do not depend on micro-batches. The trust region is
   that of DAG-DB.

In the first update on a rollout, log P_θ and x̂0(x) come from the stored outputs, which are the current policy's. Later, and
with `rollout.replay`, they take one more pass:

| pass                        | inner | last  | later updates         |
|-----------------------------|-------|-------|-----------------------|
| policy at x', no gradient   | 1     |       |                       |
| policy at x, no gradient    |       |       | 1 for each transition |
| policy at x                 | 1     | 1     |                       |
| backward to the parameters  | 1     | 1     |                       |
| **U**                       | **3** | **2** | **4** and **3**       |

Decodes are as for DAG-DB. The ratio is the D-th root of the ratio of densities, as in DDPO. R is per element too, but
advantages do not depend on its unit.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fastnabla.config.method_sections import PolicyGradient
from fastnabla.methods.accumulation import PartResult, Parts, StepReport
from fastnabla.methods.dag import DetailedBalanceStep
from fastnabla.methods.micro_batches import MicroBatch, cut
from fastnabla.methods.zero_gradients import DRIVE, largest
from fastnabla.objective.gaussian import full, guide
from fastnabla.objective.policy_gradient import clipped_surrogate, is_clipped, is_flat, leave_one_out_advantages
from fastnabla.trajectories.transitions import LazyTransitions, Transitions


class KullbackLeiblerStep(DetailedBalanceStep):
    """Accumulates the gradients of DAG-KL over batches of transitions, which hold the rewards of their trajectories.

    Its reports have the losses "balance", "surrogate" and "trust_region". By row they have "residual" δ, "ratio",
    "advantage", "step_index" and, on the host, "prompt". The statistics are those of DAG-DB, the mean "ratio" and the
    fraction "clipped", outside 1 ± ε.

    Args:
        settings: its ε and its limit of advantages.
        arguments, more: as for `DetailedBalanceStep`. `plan` also decides which updates are on-policy.
    """

    method = "dag-kl"

    def __init__(self, settings: PolicyGradient, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.settings = settings

    def __call__(self, transitions: Transitions | LazyTransitions, total: int | None = None) -> StepReport:
        """As `DetailedBalanceStep.__call__`. Advantages are those of the transitions of this call."""
        selection = transitions.select() if isinstance(transitions, Transitions) else transitions
        own, count = self.world.span(len(selection))
        total = total or count
        parts = Parts(self, len(selection), functools.partial(cut, selection, len(self.table)))

        # Train the flow, and compute the returns.
        order, residuals = [], []
        for part in parts:
            result = self._attempt(len(part.rows), self.flow_gradients, part, total)
            parts.add(result)
            if result is not None:
                order.append(part.rows)
                residuals.append(result.rows["residual"])
        residual = torch.cat(residuals)
        device = residual.device
        residual = residual[torch.cat(order).argsort().to(device, non_blocking=True)]
        whole = self.world.all_gather_rows(residual, own, count)
        advantage = leave_one_out_advantages(-whole, self.settings.advantage_clip)[own.to(device, non_blocking=True)]

        # Train the policy.
        parts.again()
        for part in parts:
            rows = part.rows.to(device, non_blocking=True)
            parts.add(self._attempt(len(part.rows), self.gradients, part, total, advantage[rows]))
        return parts.report()

    def flow_gradients(self, part: MicroBatch, total: int) -> PartResult:
        """The flow's gradients of one micro-batch, whose sums are divided by `total`, and δ by row."""
        batch = part.gather()
        reward_next = self._reward_at_next(part, batch)
        o, log_prob = self._policy_values(batch)
        residual = self._residual(part, batch, o, log_prob, reward_next)
        loss = residual.square().sum() / total
        return PartResult(
            gradients=torch.autograd.grad(loss, self.flow_parameters, allow_unused=True, materialize_grads=True),
            losses={"balance": loss.detach()},
            rows={"residual": residual.detach()},
        )

    @torch.no_grad()
    def _policy_values(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """The policy's guided output at x, and log P_θ(x'|x)."""
        row, states = self.table.rows(batch.step_index, batch.x), (batch.x, batch.x_next)
        o = full(batch.model_output)
        if not self.plan.is_on_policy(self.update):
            o = guide(self.policy(batch.x, row.timestep, batch.prompt), self.policy.guidance_scale)
        return o, self.ops.gaussian_log_prob(o, *states, row, guidance_scale=None)

    def gradients(self, part: MicroBatch, total: int, advantage: Tensor) -> PartResult:
        """The policy's gradients of one micro-batch, whose sums are divided by `total`, with its advantages `[n]`."""
        batch, w = part.gather(), self.policy.guidance_scale
        row, states = self.table.rows(batch.step_index, batch.x), (batch.x, batch.x_next)
        output = self.policy(batch.x, row.timestep, batch.prompt)
        log_prob = self.ops.gaussian_log_prob(output, *states, row, guidance_scale=w)
        log_prob_old = self.ops.gaussian_log_prob(batch.model_output, *states, row, guidance_scale=None)
        log_ratio = (log_prob - log_prob_old) / batch.x[0].numel()
        terms = {
            "surrogate": clipped_surrogate(log_ratio, advantage, self.settings.clip),
            "trust_region": self._trust_region(batch, guide(output, w)),
        }
        rows = {"ratio": log_ratio.detach().exp(), "advantage": advantage, "step_index": batch.step_index}
        return PartResult(
            gradients=self._differentiate(sum(values.sum() for values in terms.values()) / total),
            losses={name: values.detach().sum() / total for name, values in terms.items()},
            rows=rows | {"prompt": part.selection.prompt},
        )

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        clipped = is_clipped(rows["ratio"], self.settings.clip)
        return super()._statistics(rows) | {"ratio": rows["ratio"].mean(), "clipped": clipped.float().mean()}

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The advantages of rows whose surrogate has a gradient."""
        flat = is_flat(rows["ratio"], rows["advantage"], self.settings.clip)
        return {DRIVE: largest(rows["advantage"].masked_fill(flat, 0))}
