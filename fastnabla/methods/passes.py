"""What the training steps will cost, in network passes and decodes, by kind of row; the steps count what they did."""

import dataclasses

from fastnabla.objective.settings import Objective


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Of one update's training step."""

    rows: dict[str, float]
    """Rows by kind, in expectation: transitions that are "inner" or "last", or whole trajectories."""
    passes: dict[str, float]
    """U of each, on average over inner epochs."""
    decodes: dict[str, float]
    """Decodes with backward of each; one without backward is half of one."""
    flow_passes: float = 0.0
    """Passes of g_φ in all, forward ones; a backward pass is two."""

    def total(self, each: dict[str, float]) -> float:
        """Sum over the rows of what `each` row of a kind takes."""
        return sum(count * each[kind] for kind, count in self.rows.items())


def planned_passes(
    objective: Objective,
    with_flow: bool,
    run: int = 1,
    tails: float = 1,
    noising: bool = False,
    cached: bool = False,
) -> tuple[float, float]:
    """U per inner and per last transition of residual ∇-DB, or ∇-DB (the table in `fastnabla.methods.nabla_db`).

    Args:
        objective: its guidance, ρ and order.
        with_flow: whether there is a g_φ.
        run: L, adjacent transitions that share passes.
        tails: of them, how many are followed by none.
        noising: whether the backward policy is the noising kernel, which takes no pass.
        cached: whether an earlier inner epoch has kept what the reference network gave.
    """
    lookahead, ahead = objective.reward_gradient == "lookahead", objective.reward_gradient != "terminal"
    with_reverse = with_flow and objective.reverse_weight > 0
    reference = not noising and not cached
    reverse = (1 + reference) * with_reverse
    second_order = (2 + lookahead) * (with_reverse and objective.reverse_second_order)
    at_next_states = ahead * (1 + lookahead) * tails / run
    for_followers = lookahead * (run > tails)
    return 2 + reference + reverse + second_order + at_next_states + for_followers, 2 + reference


def planned_decodes(objective: Objective, with_flow: bool, run: int = 1, tails: float = 1) -> tuple[float, float]:
    """Decodes with backward per inner and per last transition; arguments as for `planned_passes`."""
    if objective.reward_gradient == "terminal":
        return 0, 1
    return (1 + tails / run if with_flow and objective.reverse_weight > 0 else 1), 1
