"""The cost of an update, computed in advance: network passes, arithmetic, memory, and time at a measured rate."""

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
    """Average cost of an optimizer update, including its part of the rollout."""

    step: StepCost
    rollout_passes: float
    """U, forward only."""
    rollout_flops: float
    step_flops: float
    state_bytes: int
    """Size of the optimizer's state."""
    traffic: dict[str, int]
    """Bytes read and written, by purpose, from `fastnabla.cost.traffic`."""


def update_trajectories(config: TrainConfig) -> int:
    """Number of trajectories that each update learns from."""
    return config.rollout.trajectories // config.rollout.updates


def rollout_passes(config: TrainConfig) -> float:
    """U of an update's part of its rollout, forward only; 0 for a method whose step samples its own trajectories."""
    each = update_trajectories(config) * config.sampler.steps / config.rollout.epochs
    return each if METHODS[config.method].stores else 0


def rollout_decodes(config: TrainConfig) -> float:
    """Decodes of an update's part of its rollout, whose finished samples are rewarded. One without backward counts half."""
    each = update_trajectories(config) / 2 / config.rollout.epochs
    return each if METHODS[config.method].stores else 0


def update_cost(config: TrainConfig, costs: UnitCosts) -> UpdateCost:
    """The cost of an update, without the rewards.

    Args:
        config: the run, with its memory settings planned.
        costs: of its networks.
    """
    rollout, step = rollout_passes(config), STEPS[config.method].cost(config)
    return UpdateCost(
        step=step,
        rollout_passes=rollout,
        rollout_flops=rollout * costs.network_flops + rollout_decodes(config) * costs.decode_flops,
        step_flops=step.total(step.passes) * costs.network_flops
        + step.total(step.decodes) * costs.decode_flops
        + step.flow_passes * costs.flow_flops,
        state_bytes=expected_state_bytes(config.optimizer.name, costs.trained_sizes),
        traffic=update_traffic(config, costs, step),
    )


PROBE_SECONDS = 5.0
"""Seconds after which `measured_rate` measures no further pass."""


@torch.no_grad()
def measured_rate(policy: Policy, costs: UnitCosts, rows: int) -> float | None:
    """FLOP/s of the policy's forward pass: the median of three passes after one to warm up. A single pass if it takes
    longer than `PROBE_SECONDS`. None for half precision on a CPU: many CPUs emulate it, and a pass can take a minute.

    Args:
        policy: on its device.
        costs: of its networks.
        rows: transitions in the pass on a GPU; a CPU gets one.
    """
    device, shapes = policy.conditions.device, costs.shapes
    if device.type == "cpu" and policy.dtype != torch.float32:
        return None
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
    return rows * costs.network_flops / statistics.median(seconds[1:] or seconds)


def cost_table(cost: UpdateCost, plan: MemoryPlan | None, rate: float | None) -> Table:
    """A table of `cost`, the planned memory, and the time at `rate` FLOP/s; None leaves the time out."""
    table = Table(title="cost of an optimizer update (U: one UNet pass over a transition's guided rows)")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_column("made up of")
    step, total = cost.step, cost.rollout_flops + cost.step_flops

    def sum_of(each: dict[str, float]) -> str:
        return " + ".join(f"{count:g} × {each[kind]:g}" for kind, count in step.rows.items())

    rows = sum(step.rows.values())
    for row in (
        ("rows of the step", f"{rows:g}", ", ".join(f"{count:g} {kind}" for kind, count in step.rows.items())),
        ("rollout", f"{cost.rollout_passes:g} U", f"{cost.rollout_flops / 1e12:.4g} TFLOP"),
        ("training step", f"{step.total(step.passes):g} U", sum_of(step.passes)),
        (
            "decodes with backward",
            f"{step.total(step.decodes):g}",
            f"{sum_of(step.decodes)}; one without backward counts half",
        ),
        (
            "arithmetic of the step",
            f"{cost.step_flops / 1e12:.4g} TFLOP",
            "UNet, decoder, flow network; not the rewards",
        ),
        ("arithmetic of a row", f"{cost.step_flops / rows / 1e12:.4g} TFLOP", "without the rollout"),
        ("memory traffic", f"{sum(cost.traffic.values()) / 1e9:.4g} GB", "uncompiled; not the rewards"),
        *((f"  {name}", f"{moved / 1e9:.4g} GB", "") for name, moved in cost.traffic.items()),
        ("optimizer's state", f"{cost.state_bytes / 2**20:.1f} MiB", "after the first update"),
    ):
        table.add_row(*row)
    if rate is None:
        table.add_row("expected time", "?", "not measured: half precision on a CPU, which may emulate it")
    else:
        table.add_row("measured rate", f"{rate / 1e12:.4g} TFLOP/s", "forward passes of the policy, measured now")
        table.add_row(
            "expected time", duration(total / rate), "rollout and step at this rate; no rewards or evaluation"
        )
    if plan is not None:
        table.add_row("memory", f"{plan.total / 1e9:.2f} GB", "see the memory plan")
    return table


def duration(seconds: float) -> str:
    """`seconds` in s, min, h or d, whichever reads best."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
