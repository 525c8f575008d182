"""The number of updates within a budget of network passes, and the measured cost of updates.

1 U is a pass of the UNet over the guided rows of a transition, forward or backward (`docs/objectives.md`). Rollouts count.
Evaluations do not count: they are the same for all methods. Decodes and the flow network do not count either: they are not
passes of the UNet.
"""

from typing import Any

from fastnabla.config.train import TrainConfig
from fastnabla.cost.update_cost import rollout_decodes, rollout_passes
from fastnabla.methods.registry import STEPS


def update_passes(config: TrainConfig) -> float:
    """Expected cost in U of an update, including its share of the rollout."""
    step = STEPS[config.method].cost(config)
    return rollout_passes(config) + step.total(step.passes)


def updates_within(config: TrainConfig, passes: float) -> int:
    """Number of updates, in whole rollouts, that cost at most `passes` U; at least those of one rollout."""
    updates = config.rollout.updates_per_rollout
    return max(1, int(passes / (update_passes(config) * updates) + 1e-9)) * updates


def planned_decodes(config: TrainConfig) -> float:
    """Decodes of a whole run, those of rollouts included. One without a backward pass counts half."""
    step = STEPS[config.method].cost(config)
    return config.updates * (rollout_decodes(config) + step.total(step.decodes))


def measured_passes(config: TrainConfig, record: dict[str, Any]) -> float:
    """Measured cost in U of an update, including its share of the rollout, from its "train" record in `metrics.jsonl`."""
    rows = {kind: record[f"rows_{kind}"] for kind in STEPS[config.method].cost(config).rows}
    return rollout_passes(config) + sum(count * record[f"passes_{kind}"] for kind, count in rows.items() if count)


def measured_rows(config: TrainConfig, record: dict[str, Any]) -> int:
    """Number of rows that an update trained on, from the same record: transitions, or trajectories for a direct method."""
    return sum(record[f"rows_{kind}"] for kind in STEPS[config.method].cost(config).rows)
