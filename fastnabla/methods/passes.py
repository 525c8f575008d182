"""The planned cost of a training step in network passes and decodes, by kind of row. Steps also count their actual passes.

U is one pass (forward, or backward to the input or to the parameters) of the UNet over a transition's guided rows.

Residual ∇-DB, passes per transition:

| pass                                  | needed for                                  | inner | last  |
|---------------------------------------|---------------------------------------------|-------|-------|
| policy at x                           | all                                         | 1     | 1     |
| backward to the parameters            | all                                         | 1     | 1     |
| reference at x                        | all; cached for later inner epochs          | 1     | 1     |
| its vector-Jacobian product           | reverse residual; cached too                | 1     |       |
| the policy's vector-Jacobian product  | reverse residual                            | 1     |       |
| policy at x'                          | "lookahead", "lookahead_detached"           | 1     |       |
| its vector-Jacobian product           | "lookahead"                                 | 1     |       |
| differentiating the policy's product  | second order                                | 2     |       |
| the reward's own product at x         | second order with "lookahead"               | 1     |       |

In total, U per transition, by `objective.reward_gradient`. The reverse residual needs a flow and ρ > 0; "forward" is without
it, and "reference" has one that follows the reference (`objective.reverse_target`):

| inner transition     | reverse | forward | second order | reference |
|----------------------|---------|---------|--------------|-----------|
| "lookahead"          | 7       | 5       | 10           | 6         |
| "lookahead_detached" | 6       | 4       | 8            | 5         |
| "terminal"           | 5       | 3       | 7            | 4         |
| last transition      | 3       | 3       | 3            | 4         |

With `reuse_passes`, L adjacent transitions share passes: the pass at x that predicts a clean sample also serves the
transition that ends in x, for one more vector-Jacobian product with "lookahead".

| reused, inner        | reverse   | forward   | second order | reference |
|----------------------|-----------|-----------|--------------|-----------|
| "lookahead"          | 6 + 2 / L | 4 + 2 / L | 9 + 2 / L    | 5 + 2 / L |
| "lookahead_detached" | 5 + 1 / L | 3 + 1 / L | 7 + 1 / L    | 4 + 1 / L |
| "terminal"           | 5         | 3         | 7            | 4         |

Plain ∇-DB and later inner epochs of residual ∇-DB run no passes of the reference. They take 2 U less per inner transition
(1 U less in the forward columns) and 1 U less per last transition. Under "reference", later inner epochs take as many passes
as the first, because the reference's product depends on φ.

Under "reference", the reference predicts the clean samples, so its passes at x' and their products replace the policy's. The
policy's product at x is not taken, and the last transition has a reverse residual too.

`objective.reverse_fraction` of the inner transitions take the passes and decodes of "reverse", the others those of "forward".

An inner transition with look-ahead takes 2 decodes with backward, or 1 without the reverse residual. If passes are reused,
it takes 1 + 1 / L, or 1. With "terminal" it takes none. A last transition takes one, or 2 under "reference" with look-ahead.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from fastnabla.objective.settings import Objective, RewardGradient


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Cost of one update's training step."""

    rows: dict[str, float]
    """Expected number of rows by kind: "inner" and "last" transitions, or whole trajectories."""
    passes: dict[str, float]
    """U per row, averaged over inner epochs."""
    decodes: dict[str, float]
    """Decodes with backward per row. A decode without backward counts half."""
    flow_passes: float = 0.0
    """Forward passes of g_φ over all rows. A backward pass counts two."""

    def total(self, each: dict[str, float]) -> float:
        """Sum over all rows, given the cost of `each` row by kind."""
        return sum(count * each[kind] for kind, count in self.rows.items())


def planned_passes(
    objective: Objective,
    with_flow: bool,
    run: int = 1,
    unshared: float = 1,
    noising: bool = False,
    cached: bool = False,
) -> tuple[float, float]:
    """U per inner and per last transition of residual ∇-DB, or of plain ∇-DB; the tables above.

    Args:
        objective: its reward gradient, ρ and order.
        with_flow: whether there is a g_φ.
        run: L, adjacent transitions that share passes.
        unshared: how many of them have a next state that is not the state of another one.
        noising: whether P_B is the noising kernel, which takes no pass.
        cached: whether an earlier inner epoch has cached the reference's part.
    """
    if objective.reverse_fraction < 1:
        return _mean_of_drawn(planned_passes, objective, with_flow, run, unshared, noising, cached)
    lookahead, ahead = objective.reward_gradient == "lookahead", objective.reward_gradient != "terminal"
    with_reverse = with_flow and objective.reverse_weight > 0
    follows = with_reverse and objective.reverse_target == "reference"
    reference = follows or (not noising and not cached)
    reverse = 1 if follows else (1 + reference) * with_reverse
    second_order = (2 + lookahead) * (with_reverse and objective.reverse_second_order)
    at_next_states = ahead * (1 + lookahead) * unshared / run
    at_shared_states = lookahead * (run > unshared)
    return 2 + reference + reverse + second_order + at_next_states + at_shared_states, 2 + reference + follows


def matching_cost(reward_gradient: RewardGradient, cached: bool = False) -> tuple[float, tuple[float, float]]:
    """U per transition, and decodes per inner and per last transition, of `fastnabla.methods.velocity_matching`; its table.

    Args:
        reward_gradient: the objective's.
        cached: whether an earlier inner epoch has cached the reference's outputs.
    """
    passes = 3 + (reward_gradient == "lookahead") - cached
    return passes, (0, 1) if reward_gradient == "terminal" else (1, 1)


def planned_decodes(objective: Objective, with_flow: bool, run: int = 1, unshared: float = 1) -> tuple[float, float]:
    """Decodes with backward per inner and per last transition; arguments as for `planned_passes`."""
    if objective.reverse_fraction < 1:
        return _mean_of_drawn(planned_decodes, objective, with_flow, run, unshared)
    if objective.reward_gradient == "terminal":
        return 0, 1
    with_reverse = with_flow and objective.reverse_weight > 0
    last = 2 if with_reverse and objective.reverse_target == "reference" else 1
    return (1 + unshared / run if with_reverse else 1), last


def _mean_of_drawn(
    planned: Callable[..., tuple[float, float]], objective: Objective, *arguments: Any
) -> tuple[float, float]:
    """``planned(objective, …)``, averaged over the transitions with and without a reverse residual."""
    fraction = objective.reverse_fraction
    drawn = planned(dataclasses.replace(objective, reverse_fraction=1.0), *arguments)
    other = planned(dataclasses.replace(objective, reverse_fraction=1.0, reverse_weight=0.0), *arguments)
    inner, last = (fraction * one + (1 - fraction) * two for one, two in zip(drawn, other, strict=True))
    return inner, last
