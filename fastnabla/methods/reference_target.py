"""Residual ∇-DB whose flow follows the reference policy: `objective.reverse_target = "reference"`.

The policy is in no target here. ∇r is taken at the reference's predictions, and the target of the flow score is carried back
through the reference alone (`fastnabla.objective.reference_target`). So the policy takes two passes per transition, and all
vector-Jacobian products are the frozen network's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastnabla.methods.accumulation import PartResult
from fastnabla.methods.micro_batches import MicroBatch
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.methods.reward_scores import RewardScores, predicted_scores, unshared_scores
from fastnabla.models.decoder import Decoder, RewardFunction
from fastnabla.models.policy import Policy
from fastnabla.objective.settings import Backend, Objective
from fastnabla.optim.ema import WeightAverage
from fastnabla.trajectories.transitions import Transitions
from fastnabla.transition import TransitionRows, TransitionTable


class ReferenceTargetStep(BalanceStep):
    """As `BalanceStep`, with a flow. The last transition has a reverse residual too, through which the reward enters, and
    no terminal term: the target counts g(x_T) as 0.

    Args:
        policy, flow, decoder, reward, prompts, table, objective, micro_batch, backend, reuse_passes: as for `BalanceStep`.
        average: decay of an average of φ with which g(x') is computed; None for φ itself.
    """

    reverse_target = "reference"

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
        reuse_passes: bool = False,
        average: float | None = None,
    ) -> None:
        super().__init__(policy, flow, decoder, reward, prompts, table, objective, micro_batch, backend, reuse_passes)
        parameters = dict(flow.named_parameters())
        self.average = None if average is None else WeightAverage(parameters, average)

    def state_dict(self) -> dict[str, Tensor]:
        """As `Accumulation.state_dict`: the average of φ."""
        if self.average is None:
            return {}
        state = self.average.state_dict()
        return {"updates": torch.tensor(state["updates"])} | state["average"]

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """As `Accumulation.load_state_dict`."""
        if self.average is not None:
            average = {name: state[name] for name in self.average.average}
            self.average.load_state_dict({"updates": int(state["updates"]), "average": average})

    def after_update(self) -> None:
        """As `Accumulation.after_update`: average in the new φ."""
        if self.average is not None:
            self.average.update()

    def gradients(self, part: MicroBatch, total: int, terminal: dict[int, Tensor] | None = None) -> PartResult:
        """As `BalanceStep.gradients`."""
        batch = part.gather()
        rows = self.table.rows(batch.step_index, batch.x)
        states = (batch.x, batch.x_next, rows)

        # g(x') is a constant. The flow network is not used at x_T.
        flow_next, weights = None, None if self.average is None else self.average.average
        if not part.last:
            with torch.no_grad():
                flow_next = self._flow_values(batch.x_next, rows.timestep_next, batch.prompt, weights)

        # Reference: o_ref, reward scores, and the product that carries the next flow score back.
        with self.policy.pretrained_weights():
            output_ref, vjp, reward = self._reference_scores(part, batch, rows, flow_next, terminal)

        # Forward residual, s_θ − λ s_ref − h(x'), with the trust region. It trains θ alone.
        output = self.policy(batch.x, rows.timestep, batch.prompt)
        forward = self.ops.forward_balance(
            output, output_ref, *states, reward.at_next, flow_next, batch.model_output, **self._settings
        )

        # Reverse residual, g(x) + ∇R(x) − (∂μ_ref/∂x)ᵀ h(x'). It trains φ alone.
        flow = self._flow_values(batch.x, rows.timestep, batch.prompt)
        scores = (reward.at_next, flow_next, reward.at_current, reward.at_prediction)
        reverse = self.ops.reference_balance(vjp, rows, flow, *scores, objective=self.objective)
        return self._part_result(part, batch, total, forward, self.objective.reverse_weight * reverse)

    def _reference_scores(
        self,
        part: MicroBatch,
        batch: Transitions,
        rows: TransitionRows,
        flow_next: Tensor | None,
        terminal: dict[int, Tensor] | None,
    ) -> tuple[Tensor, Tensor, RewardScores]:
        """o_ref as a pair, the vector-Jacobian product of `reference_cotangent` `[n, …]`, and the reward scores."""
        policy, pixel_gradient = self.policy, self._pixel_gradient
        through_network = self.objective.reward_gradient == "lookahead"
        if terminal is not None:
            score = torch.stack([terminal[slot] for slot in part.selection.trajectory.tolist()])
            reward = RewardScores(at_next=score, at_current=score)
        elif part.last:
            unshared = pixel_gradient(batch.x_next, part.selection.prompt.tolist())
        else:
            unshared = unshared_scores(policy, pixel_gradient, part, batch, self.table, through_network)
        x = batch.x.detach().requires_grad_()
        output = policy(x, rows.timestep, batch.prompt)
        if terminal is None:
            here = (rows, x, output, unshared)
            reward = predicted_scores(
                policy, pixel_gradient, part, *here, through_network=through_network, at_current=True
            )
        cotangent = self.ops.reference_cotangent(
            output.detach(),
            rows,
            reward.at_next,
            flow_next,
            reward.at_prediction if through_network else None,
            **self._settings,
        )
        (vjp,) = torch.autograd.grad(output, x, cotangent)
        return output.detach(), vjp, reward
