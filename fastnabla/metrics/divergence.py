"""How far finetuning has moved the sampler: KL(P_θ ‖ P_ref) along the policy's own trajectories.

From the same state, both policies take Gaussian steps with the same σ, so each step's divergence is exact:

    KL(N(μ_θ, σ² I) ‖ N(μ_ref, σ² I)) = ‖μ_θ − μ_ref‖² / (2 σ²) = (b/σ)² ‖o_θ − o_ref‖² / 2

with guided outputs o. By the chain rule, the expectation of the sum over a policy trajectory is the KL divergence of the two
trajectory distributions. It bounds the divergence of the finished samples from above. These have the last step's noise. A flow
model's evaluated samples have not (`TransitionTable.ends_at_prediction`), and the bound is not theirs.
"""

from typing import Any

import torch
from torch import Tensor

from fastnabla.models.policy import Policy
from fastnabla.objective.gaussian import full, guide
from fastnabla.transition import TransitionRows, TransitionTable


def step_divergence(o: Tensor, o_ref: Tensor, rows: TransitionRows) -> Tensor:
    """KL of each policy step from the reference step `[N]`, in nats, from the guided outputs `[N, …]` of both."""
    return (0.5 * (rows.b / rows.sigma * (full(o) - full(o_ref))).square()).flatten(1).sum(1)


def divergence_summary(steps: Tensor) -> dict[str, Any]:
    """Summary of the KL of N trajectories by step `[N, T]`, in nats.

    - "nats", "standard_error": mean over trajectories of the sum over steps, and its standard error.
    - "without_last_two", "without_last_two_standard_error": the same without the last two steps. b/σ is far larger there with
      "leading" spacing, so that they can have most of the sum.
    - "by_step": mean of each step, a list of T.
    """

    def mean(total: Tensor) -> tuple[float, float]:
        return total.mean().item(), (total.std() / len(total) ** 0.5).item()

    names = ("nats", "standard_error", "without_last_two", "without_last_two_standard_error")
    values = (*mean(steps.sum(1)), *mean(steps[:, :-2].sum(1)))
    return dict(zip(names, values, strict=True)) | {"by_step": steps.mean(0).tolist()}


class TrajectoryDivergence:
    """Measures trajectories while they are sampled, with one reference pass per step.

    Pass it to `fastnabla.trajectories.rollout.sample` as `buffer`, with ``slots = torch.arange(N)``.

    Args:
        policy: the policy that samples the trajectories.
        table: the sampler.
        prompt: prompt numbers `[N]` of the trajectories.

    Raises:
        ValueError: the sampler's steps have no noise, so that the divergence is infinite.
    """

    def __init__(self, policy: Policy, table: TransitionTable, prompt: Tensor) -> None:
        if table.is_deterministic:
            raise ValueError("table: its steps have no noise, so their divergence is infinite; sample with noise.")
        self.policy, self.table, self.prompt = policy, table, prompt
        self.steps = torch.zeros(len(prompt), len(table), dtype=torch.float64)
        """KL of each step `[N, T]`, in nats, on the CPU. The sum over a row is an unbiased estimate of the trajectory KL."""

    @torch.no_grad()
    def append(self, slots: Tensor, step: int, x: Tensor, model_output: Tensor, x_next: Tensor) -> None:
        """Record step `step` of the trajectories `slots [n]`: from x to x' by the guided output o, all `[n, …]`."""
        rows = self.table.rows(torch.full((len(x),), step, device=x.device), x)
        output = self.policy.reference(x, rows.timestep, self.prompt[slots].to(x.device))
        o_ref = guide(output, self.policy.guidance_scale)
        self.steps[slots, step] = step_divergence(model_output, o_ref, rows).double().cpu()
