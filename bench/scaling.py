"""Models how an update scales over GPUs, from the package's cost model; nothing is measured.

    python -m bench.scaling [--preset sd15-aesthetic] [--rank 8] [--rate 300] [--between 25] [--spreads 0 0.05]

An update waits for its slowest rank twice: until all ranks have rewards, and until all have gradients. The gradients are then
summed with ring all-reduces: within a node, between nodes in as many parts as a node has GPUs, and within a node again, as in
NCCL's hierarchical all-reduce. Assumed are lognormal times of a rank and all rates and latencies; each is an argument.
Rewards, evaluations (whose metrics rank 0 computes alone) and checkpoints are not included.
"""

import argparse
import dataclasses
import math

import numpy as np
import torch

from bench.tables import markdown_table
from fastnabla.config.presets import PRESETS
from fastnabla.config.train import TrainConfig
from fastnabla.cost.planner import planned, unit_costs
from fastnabla.cost.update_cost import update_cost, update_trajectories
from fastnabla.distributed.world import BUCKET

NODES = (1, 2, 4, 8, 16, 32, 64)
HOST_COLLECTIVES = 12
"""Number of host collectives in an update, of a few bytes each."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Assumptions about GPUs and networks."""

    rate: float
    """FLOP/s that a GPU sustains in the networks' passes."""
    gpus: int
    """GPUs in a node."""
    within: float
    """Bytes/s in each direction from a GPU to others in its node."""
    between: float
    """Bytes/s in each direction from a GPU to other nodes: the node's bandwidth divided by its GPUs."""
    latency: float
    """Seconds of a ring step."""
    host: float
    """Seconds of a host collective, for each doubling of the ranks."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of an update."""

    rollout: float
    """FLOP to sample and decode a trajectory."""
    step: float
    """FLOP of a trajectory's transitions in the training step."""
    reduced: int
    """Bytes of gradients."""


def work_of(config: TrainConfig) -> Work:
    """The work of an update of `config`, by trajectory."""
    config = planned(config, torch.device("cpu"))[0]
    costs = unit_costs(config)
    cost, trajectories = update_cost(config, costs), update_trajectories(config)
    return Work(
        rollout=cost.rollout_flops / trajectories,
        step=cost.step_flops / trajectories,
        reduced=4 * sum(costs.trained_sizes),
    )


def ring_seconds(size: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Seconds of a ring all-reduce of `size` bytes: each rank sends and receives 2 (ranks − 1) / ranks of them in
    2 (ranks − 1) steps."""
    return 2 * (ranks - 1) * (size / ranks / bandwidth + latency)


def reduce_seconds(size: float, nodes: int, machine: Machine) -> float:
    """Seconds to sum the gradients. Between nodes, each GPU sums its part of the gradients."""
    latency = math.ceil(size / BUCKET) * machine.latency
    within = ring_seconds(size, machine.gpus, machine.within, latency)
    return within + ring_seconds(size / machine.gpus, nodes, machine.between, latency)


def slowest(ranks: int, spread: float, trials: int, seed: int) -> float:
    """Mean of the largest of `ranks` lognormal times of mean 1 and standard deviation `spread`."""
    if spread == 0:
        return 1.0
    variance = math.log1p(spread**2)
    generator = np.random.default_rng(seed)
    largest = [generator.lognormal(-variance / 2, math.sqrt(variance), ranks).max() for _ in range(trials)]
    return float(np.mean(largest))


def update_seconds(work: Work, trajectories: int, nodes: int, machine: Machine, straggling: float = 1.0) -> float:
    """Seconds of an update in which the busiest rank has `trajectories`, and the slowest takes `straggling` times the mean."""
    compute = trajectories * (work.rollout + work.step) / machine.rate
    return compute * straggling + overhead_seconds(work, nodes, machine)


def overhead_seconds(work: Work, nodes: int, machine: Machine) -> float:
    """Seconds of communication in an update, which a single rank would not need."""
    hosts = HOST_COLLECTIVES * machine.host * math.log2(nodes * machine.gpus)
    return reduce_seconds(work.reduced, nodes, machine) + hosts


def table(
    work: Work, machine: Machine, each: int | None, batch: int, spreads: list[float], trials: int, seed: int
) -> list[tuple[str, ...]]:
    """A row for each of the `NODES` with at most as many GPUs as trajectories; columns as in `HEADER`.

    Args:
        work: of an update.
        machine: assumptions about the hardware.
        each: trajectories of an update on each GPU; None for `batch` in total.
        batch: see `each`.
        spreads: relative standard deviations of the ranks' times, a column each.
        trials: simulated updates.
        seed: of the simulation.
    """
    rows = []
    for nodes in NODES:
        ranks = nodes * machine.gpus
        total = batch if each is None else each * ranks
        if total < ranks:
            continue
        busiest, single = math.ceil(total / ranks), total * (work.rollout + work.step) / machine.rate
        seconds, overhead = update_seconds(work, busiest, nodes, machine), overhead_seconds(work, nodes, machine)
        reduced = reduce_seconds(work.reduced, nodes, machine)
        cells = [
            str(nodes),
            str(total),
            str(busiest),
            f"{seconds:.2f}",
            f"{1e3 * reduced:.2f}",
            f"{overhead / seconds:.2%}",
        ]
        for spread in spreads:
            straggling = slowest(ranks, spread, trials, seed)
            cells.append(f"{single / ranks / update_seconds(work, busiest, nodes, machine, straggling):.1%}")
        rows.append(tuple(cells))
    return rows


HEADER = ("nodes", "trajectories", "on the busiest GPU", "s an update", "summing, ms", "overhead")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="sd15-aesthetic", help="preset of model, sampler and objective; with random weights")
    add("--rank", type=int, default=8, help="rank of the LoRA; 0 trains the whole UNet, replicated")
    add("--each", type=int, default=8, help="trajectories of an update on each GPU, in the first table")
    add("--batch", type=int, default=64, help="trajectories of an update in total, in the second table")
    add("--rate", type=float, default=300, help="TFLOP/s that a GPU sustains")
    add("--gpus", type=int, default=8, help="GPUs in a node")
    add("--within", type=float, default=300, help="GB/s from a GPU to others in its node")
    add("--between", type=float, default=25, help="GB/s from a GPU to other nodes")
    add("--latency", type=float, default=10, help="µs of a ring step")
    add("--host", type=float, default=200, help="µs of a host collective, for each doubling of the ranks")
    add(
        "--spreads", type=float, nargs="*", default=[0, 0.02, 0.05, 0.1], help="relative deviations of the ranks' times"
    )
    add("--trials", type=int, default=1000, help="simulated updates")
    add("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    config = PRESETS[settings.preset][1]
    work = work_of(
        dataclasses.replace(
            config,
            vram=80.0,
            model=dataclasses.replace(config.model, random_init=True),
            lora=dataclasses.replace(config.lora, rank=settings.rank),
        )
    )
    machine = Machine(
        rate=1e12 * settings.rate,
        gpus=settings.gpus,
        within=1e9 * settings.within,
        between=1e9 * settings.between,
        latency=1e-6 * settings.latency,
        host=1e-6 * settings.host,
    )
    print(
        f"{settings.preset}, LoRA of rank {settings.rank}: {work.rollout / 1e12:.0f} + {work.step / 1e12:.0f} TFLOP a "
        f"trajectory for rollout and step; {work.reduced / 2**20:.1f} MiB of gradients an update"
    )
    header = (*HEADER, *(f"efficiency, spread {spread:.0%}" for spread in settings.spreads))
    for each in (settings.each, None):
        print(f"\n{each} trajectories a GPU:\n" if each else f"\n{settings.batch} trajectories in total:\n")
        rows = table(work, machine, each, settings.batch, settings.spreads, settings.trials, settings.seed)
        print("\n".join(markdown_table(header, rows)))


if __name__ == "__main__":
    main()
