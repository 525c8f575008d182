"""First-order matching of velocities for flow models: VGG-Flow (arXiv 2512.05116) and Reward Score Matching (2604.17415).

At the states x_t of sampled trajectories, the velocity regresses on the pretrained one, moved along the reward's gradient:

    ‖ v_θ(x_t) − [v_ref(x_t) − β γ(t) ∇r] ‖²

Velocities point from data to noise, so less of them is more of the reward. Both papers sample by Euler's steps of the ODE
(`sampler.scheduler` = euler); the loss needs the states alone, so any sampler will do.

|          | γ(t)                    | ∇r                                               |
|----------|-------------------------|--------------------------------------------------|
| VGG-Flow | (1 − t)², or 1 − t or 1 | in x_t, of the one-step prediction x̂0 = x_t − t v |
| RSM      | 1 − t                   | in x_T, at the finished sample                   |

VGG-Flow's matching loss is ``‖ v_θ − v_ref + β g_φ ‖²`` with ``g_φ = −γ ∇r + ν_φ`` in time from noise to data. Here ν_φ = 0: its network,
the consistency loss and the boundary loss that train it are left out, as in the baseline that Reward Score Matching starts from.
The authors' code detaches x̂0 from the network ("lookahead_detached"); the formula does not ("lookahead").

It is the forward residual of ∇-DB on other rows (`unit_rows`): steps ``x' = x − o`` with σ = 1, of which x' is never taken.

| pass                                          | "lookahead" | "lookahead_detached", "terminal" |
|-----------------------------------------------|-------------|----------------------------------|
| policy at x                                   | 1           | 1                                |
| its vector-Jacobian product                   | 1           |                                  |
| backward to the parameters                    | 1           | 1                                |
| reference at x; cached for later inner epochs | 1           | 1                                |
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnabla.methods.accumulation import PartResult
from fastnabla.methods.micro_batches import MicroBatch
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.methods.reward_scores import current_scores
from fastnabla.models.decoder import Decoder, RewardFunction
from fastnabla.models.policy import Policy
from fastnabla.objective.settings import Backend, Objective
from fastnabla.transition import TransitionTable


def unit_rows(table: TransitionTable) -> TransitionTable:
    """The rows with which `forward_balance` matches outputs at the states of `table`: steps ``x' = x − o + ε`` that stay at their
    noise level. Between equal states, x' = x, a step's score is −o."""
    one = torch.ones_like(table.sigma)
    here = {f"{name}_next": getattr(table, name) for name in ("timestep", "c", "d", "alpha_bar", "noise_std")}
    return dataclasses.replace(table, a=one, b=-one, sigma=one, **here)


class VelocityMatchingStep(BalanceStep):
    """Accumulates the gradients of the loss above over batches of transitions, of which only the states x are used; for
    terminal reward gradients also the finished samples.

    Its reports are those of `BalanceStep`. "norm_ref" is ‖v_ref‖, "norm_residual" ‖v_θ − v_ref‖, "norm_reward" ‖βγ∇r‖ and
    "norm_target" the norm of the target.

    Args:
        policy, decoder, reward, prompts, micro_batch, backend: as for `BalanceStep`.
        table: a sampler of flow matching, with or without noise.
        objective: its β, γ, reward gradient and κ; λ must be 1.

    Raises:
        ValueError: the model is not one of flow matching, or λ is not 1.
    """

    def __init__(
        self,
        policy: Policy,
        decoder: Decoder,
        reward: RewardFunction,
        prompts: Sequence[str],
        table: TransitionTable,
        objective: Objective,
        micro_batch: int,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(policy, None, decoder, reward, prompts, table, objective, micro_batch, backend)
        if not table.is_flow_matching:
            raise ValueError(
                "table: is of a variance-preserving diffusion; velocity matching needs one of flow matching."
            )
        if objective.prior_weight != 1:
            raise ValueError(
                f"objective.prior_weight = {objective.prior_weight}: velocity matching has no λ; set it to 1."
            )
        self.units = unit_rows(table)

    def gradients(self, part: MicroBatch, total: int, terminal: dict[int, Tensor] | None = None) -> PartResult:
        """As `BalanceStep.gradients`."""
        policy, batch = self.policy, part.gather()
        x, rows = batch.x.detach().requires_grad_(), self.table.rows(batch.step_index, batch.x)

        # Reference v_ref and policy v_θ.
        output_ref, _ = self._reference(x, batch, rows, False, part.selection.reference)
        output = policy(x, rows.timestep, batch.prompt)

        # Reward score ∇r.
        if terminal is None:
            through_network = self.objective.reward_gradient == "lookahead"
            score = current_scores(policy, self._pixel_gradient, part, rows, x, output, through_network=through_network)
        else:
            score = torch.stack([terminal[slot] for slot in part.selection.trajectory.tolist()])

        # Residual −(v_θ − v_ref) − βγ∇r, with the trust region.
        units = self.units.rows(batch.step_index, batch.x)
        forward = self.ops.forward_balance(
            output, output_ref, batch.x, batch.x, units, score, None, batch.model_output, **self._settings
        )
        return self._part_result(part, batch, total, forward, None)
