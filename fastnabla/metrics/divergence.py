"""How far finetuning has moved the sampler: KL(P_θ ‖ P_ref) along the policy's own trajectories.

Both policies take Gaussian steps of the same σ from the same state, so each step's divergence is known exactly,

    KL(N(μ_θ, σ² I) ‖ N(μ_ref, σ² I)) = ‖μ_θ − μ_ref‖² / (2 σ²) = (b/σ)² ‖o_θ − o_ref‖² / 2

with guided outputs o, and by the chain rule the expectation of their sum over a trajectory of the policy is the
divergence of the two distributions of trajectories. That of the finished samples is at most as large.
"""

import torch
from torch import Tensor

from fastnabla.models.policy import Policy
from fastnabla.objective.gaussian import full, guide
from fastnabla.transition import TransitionRows, TransitionTable


def step_divergence(o: Tensor, o_ref: Tensor, rows: TransitionRows) -> Tensor:
    """KL of the policy's step from the reference's, in nats, by row `[N]`, from their guided outputs `[N, …]`."""
    return (0.5 * (rows.b / rows.sigma * (full(o) - full(o_ref))).square()).flatten(1).sum(1)


class TrajectoryDivergence:
    """Measures trajectories while they are sampled, by one reference pass a step: give it to
    `fastnabla.trajectories.rollout.sample` as the `buffer`, with ``slots = torch.arange(N)``.

    Args:
        policy: whose trajectories they are.
        table: the sampler.
        prompt: prompt numbers `[N]` of the trajectories.
    """

    def __init__(self, policy: Policy, table: TransitionTable, prompt: Tensor) -> None:
        self.policy, self.table, self.prompt = policy, table, prompt
        self.steps = torch.zeros(len(prompt), len(table), dtype=torch.float64)
        """KL of each step, in nats, `[N, T]` on the host; the sum over a row estimates the trajectories' KL without bias."""

    @torch.no_grad()
    def append(self, slots: Tensor, step: int, x: Tensor, model_output: Tensor, x_next: Tensor) -> None:
        """Take in step `step` of the trajectories `slots [n]`, from x by the guided output o to x', all `[n, …]`."""
        rows = self.table.rows(torch.full((len(x),), step, device=x.device), x)
        output = self.policy.reference(x, rows.timestep, self.prompt[slots].to(x.device))
        o_ref = guide(output, self.policy.guidance_scale)
        self.steps[slots, step] = step_divergence(model_output, o_ref, rows).double().cpu()
