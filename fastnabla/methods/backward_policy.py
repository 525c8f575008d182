"""P_B of the balance conditions: what the policy's score of a step is compared with.

Both kinds give an output o_B, such that ``N(a x + b o_B, σ² I)`` has P_B's score in x', and, where the reverse residual
needs it, what stands for P_B's vector-Jacobian product ``J_Bᵀ b e_B``.
"""

from typing import Protocol

import torch
from torch import Tensor

from fastnabla.models.policy import Policy
from fastnabla.objective.gaussian import guide
from fastnabla.objective.noising import check_is_ddpm, noising_output, noising_reverse
from fastnabla.objective.ops import ObjectiveOps
from fastnabla.objective.settings import Objective
from fastnabla.trajectories.reference_cache import CachedRows
from fastnabla.trajectories.transitions import Transitions
from fastnabla.transition import TransitionRows, TransitionTable


class BackwardPolicy(Protocol):
    """Computes o_B and its product for the transitions of a micro-batch."""

    passes: int
    """U for the output, and U for the product."""

    def __call__(
        self, x: Tensor, batch: Transitions, row: TransitionRows, with_reverse: bool, cached: CachedRows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Output pair `[2n, …]` (`[n, …]` without guidance) and product `[n, …]`, both without gradient.

        Args:
            x: the states of `batch`, a leaf that requires a gradient.
            batch: the transitions.
            row: their rows of the table.
            with_reverse: whether the product is needed.
            cached: where an earlier inner epoch has kept what a network gave, and else to keep it; None for nowhere.
        """


class PretrainedReversal:
    """The reversal of the pretrained sampler: residual ∇-DB, in which the score of the pretrained policy stands.

    Args:
        policy: with its reference policy.
        kernels: what computes the cotangent.
        objective: its λ.
    """

    passes = 1

    def __init__(self, policy: Policy, kernels: ObjectiveOps, objective: Objective) -> None:
        self.policy, self.ops = policy, kernels
        self.settings = {"objective": objective, "guidance_scale": policy.guidance_scale}

    def __call__(
        self, x: Tensor, batch: Transitions, row: TransitionRows, with_reverse: bool, cached: CachedRows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `BackwardPolicy`. Nothing here depends on the policy, nor on φ, so that what was kept is what would be
        computed, but for the rounding of another micro-batch."""
        known = None if cached is None else cached.read()
        if known is not None:
            o, vjp = known
            return o if self.policy.guidance_scale is None else torch.cat([o, o]), vjp if with_reverse else None
        output, vjp = self._computed(x, batch, row, with_reverse)
        if cached is not None:
            cached.write(guide(output, self.policy.guidance_scale), vjp)
        return output, vjp

    def _computed(
        self, x: Tensor, batch: Transitions, row: TransitionRows, with_reverse: bool
    ) -> tuple[Tensor, Tensor | None]:
        # In the backward pass too, where checkpointed blocks are computed again.
        with self.policy.pretrained_weights():
            with torch.set_grad_enabled(with_reverse):
                output = self.policy(x, row.timestep, batch.prompt)
            if not with_reverse:
                return output, None
            states = (batch.x, batch.x_next, row)
            cotangent = self.ops.reverse_cotangent(output.detach(), *states, **self.settings)
            (vjp,) = torch.autograd.grad(output, x, cotangent)
            return output.detach(), vjp


class NoisingKernel:
    """The noising kernel of DDPM, known in closed form: plain ∇-DB (`fastnabla.objective.noising`).

    Args:
        table: the sampler.
        guided: whether outputs are pairs.

    Raises:
        ValueError: the sampler's steps are not DDPM's.
    """

    passes = 0

    def __init__(self, table: TransitionTable, guided: bool) -> None:
        check_is_ddpm(table, "db")
        self.guided = guided

    def __call__(
        self, x: Tensor, batch: Transitions, row: TransitionRows, with_reverse: bool, cached: CachedRows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `BackwardPolicy`."""
        o = noising_output(batch.x, batch.x_next, row)
        rest = noising_reverse(batch.x, batch.x_next, row) if with_reverse else None
        return torch.cat([o, o]) if self.guided else o, rest
