"""How many updates a method makes of a number of network passes, and what its updates have taken.

A pass, U, is one of the UNet over a transition's guided rows, forward or backward (`docs/objectives.md`). Rollouts count;
evaluations do not, which are the same for all methods, nor decodes and the flow network, which are no passes of the UNet.
"""

from typing import Any

from fastnabla.config.train import TrainConfig
from fastnabla.cost.update_cost import rollout_passes
from fastnabla.methods.registry import STEPS


def update_passes(config: TrainConfig) -> float:
    """U that an update of the run `config` is expected to take, its share of the rollout included."""
    step = STEPS[config.method].cost(config)
    return rollout_passes(config) + step.total(step.passes)


def updates_within(config: TrainConfig, passes: float) -> int:
    """Updates, in whole rollouts, that take at most `passes` U; at least those of one rollout."""
    updates = config.rollout.updates_per_round
    return max(1, int(passes / (update_passes(config) * updates) + 1e-9)) * updates


def measured_passes(config: TrainConfig, record: dict[str, Any]) -> float:
    """U that an update took, its share of the rollout included, by its record "train" in `metrics.jsonl`."""
    rows = {kind: record[f"rows_{kind}"] for kind in STEPS[config.method].cost(config).rows}
    return rollout_passes(config) + sum(count * record[f"passes_{kind}"] for kind, count in rows.items() if count)


def measured_rows(config: TrainConfig, record: dict[str, Any]) -> int:
    """Rows that an update learned from, by the same record: transitions, or of a direct method trajectories."""
    return sum(record[f"rows_{kind}"] for kind in STEPS[config.method].cost(config).rows)
