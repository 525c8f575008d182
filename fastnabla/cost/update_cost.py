"""What an update costs, before any is made: network passes, arithmetic, memory, and time at a measured rate."""

import dataclasses
import statistics
import time

import torch
from rich.table import Table

from fastnabla.config.methods import METHODS
from fastnabla.config.train import TrainConfig
from fastnabla.cost.planner import MemoryPlan
from fastnabla.cost.traffic import update_traffic
from fastnabla.cost.unit_costs import UnitCosts
from fastnabla.methods.passes import StepCost
from fastnabla.methods.registry import STEPS
from fastnabla.models.policy import Policy
from fastnabla.optim.optimizer import expected_state_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCost:
    """What an optimizer update costs on average, its share of the rollout included."""

    step: StepCost
    rollout_passes: float
    """U, forward only."""
    rollout_flops: float
    step_flops: float
    state_bytes: int
    """Of the optimizer."""
    traffic: dict[str, int]
    """Bytes read and written, by purpose; see `fastnabla.cost.traffic`."""


def update_trajectories(config: TrainConfig) -> int:
    """Trajectories that an update of the run `config` learns from."""
    return config.rollout.trajectories // config.rollout.updates


def rollout_passes(config: TrainConfig) -> float:
    """U of an update's share of its rollout, forward only; 0 of a method whose step samples on its own."""
    each = update_trajectories(config) * config.sampler.steps / config.rollout.epochs
    return each if METHODS[config.method].stores else 0


def update_cost(config: TrainConfig, costs: UnitCosts) -> UpdateCost:
    """The cost of an update of the run `config`, whose memory settings are planned; the rewards' own is not in it."""
    stores, rollout = METHODS[config.method].stores, rollout_passes(config)
    step = STEPS[config.method].cost(config)
    # Finished samples are decoded once, forward only, for their rewards.
    rollout_decodes = update_trajectories(config) / 2 / config.rollout.epochs if stores else 0
    return UpdateCost(
        step=step,
        rollout_passes=rollout,
        rollout_flops=rollout * costs.unet_flops + rollout_decodes * costs.decode_flops,
        step_flops=step.total(step.passes) * costs.unet_flops
        + step.total(step.decodes) * costs.decode_flops
        + step.flow_passes * costs.flow_flops,
        state_bytes=expected_state_bytes(config.optimizer.name, costs.trained_sizes),
        traffic=update_traffic(config, costs, step),
    )


PROBE_SECONDS = 5.0


@torch.no_grad()
def measured_rate(policy: Policy, costs: UnitCosts, rows: int) -> float:
    """FLOP/s of the policy's forward pass: the median of three after one to warm up, or a single one if it takes longer
    than `PROBE_SECONDS`.

    Args:
        policy: on its device.
        costs: of its networks.
        rows: transitions in the pass on a GPU; on a CPU one will do.
    """
    device, shapes = policy.conditions.device, costs.shapes
    rows = max(policy.static_rows, default=rows if device.type == "cuda" else 1)
    x = torch.randn(rows, *shapes.sample_shape, device=device)
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    policy.conditions.ensure(torch.zeros(1, dtype=torch.int64))
    seconds: list[float] = []
    while len(seconds) < 4 and sum(seconds) < PROBE_SECONDS:
        started = time.perf_counter()
        policy(x, zeros, zeros)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return rows * costs.unet_flops / statistics.median(seconds[1:] or seconds)


def cost_table(cost: UpdateCost, plan: MemoryPlan | None, rate: float) -> Table:
    """`cost`, with the memory it takes, and how long it takes at `rate` FLOP/s."""
    table = Table(title="cost of an optimizer update (U: one UNet pass over a transition's guided rows)")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_column("how it comes about")
    step, total = cost.step, cost.rollout_flops + cost.step_flops

    def sum_of(each: dict[str, float]) -> str:
        return " + ".join(f"{count:g} × {each[kind]:g}" for kind, count in step.rows.items())

    rows = sum(step.rows.values())
    for row in (
        ("rows of the step", f"{rows:g}", ", ".join(f"{count:g} {kind}" for kind, count in step.rows.items())),
        ("rollout", f"{cost.rollout_passes:g} U", f"{cost.rollout_flops / 1e12:.4g} TFLOP"),
        ("training step", f"{step.total(step.passes):g} U", sum_of(step.passes)),
        ("decodes with backward", f"{step.total(step.decodes):g}", f"{sum_of(step.decodes)}; one without is half"),
        (
            "arithmetic of the step",
            f"{cost.step_flops / 1e12:.4g} TFLOP",
            "UNet, decoder, flow network; not the rewards",
        ),
        ("arithmetic of a row", f"{cost.step_flops / rows / 1e12:.4g} TFLOP", "without the rollout"),
        ("memory traffic", f"{sum(cost.traffic.values()) / 1e9:.4g} GB", "uncompiled; not the rewards"),
        *((f"  {name}", f"{moved / 1e9:.4g} GB", "") for name, moved in cost.traffic.items()),
        ("optimizer's state", f"{cost.state_bytes / 2**20:.1f} MiB", "after the first update"),
        ("measured rate", f"{rate / 1e12:.4g} TFLOP/s", "the policy's forward pass, just now"),
        ("expected time", duration(total / rate), "rollout and step at that rate; not the rewards, nor evaluation"),
    ):
        table.add_row(*row)
    if plan is not None:
        table.add_row("memory", f"{plan.total / 1e9:.2f} GB", "see the memory plan")
    return table


def duration(seconds: float) -> str:
    """`seconds` in the unit that suits them."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
