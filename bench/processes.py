"""Times an update on each rank: rollout, step, summing the gradients, optimizer.

    python -m bench.processes --trajectories 16
    torchrun --nproc-per-node 2 -m bench.processes --trajectories 16

trains the testbed's policy without evaluations. Each rank reports medians over updates, of wall-clock time and of CPU time.
Other work on the machine does not affect CPU time, so compare that if ranks share a core. Only the wall-clock time includes
waiting for other ranks. Summing the gradients is also timed separately, after a barrier: the minimum of several sums.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from bench.measure import device_info
from bench.tables import markdown_table
from fastnabla.config.presets import PRESETS
from fastnabla.config.training_sections import RolloutConfig
from fastnabla.distributed.devices import device_of
from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.world import World
from fastnabla.training.trainer import Trainer

PHASES = ("rollout", "step", "sum", "optimizer")


class Stopwatch:
    """Seconds by phase and update.

    Args:
        device: synchronised after each phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wall: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.cpu: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def time(self, phase: str, function: Callable[[], object]) -> object:
        """Time a call of `function`, and return its result."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.wall[phase].append(time.perf_counter() - wall)
        self.cpu[phase].append(time.process_time() - cpu)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=16, help="trajectories of an update, on all ranks together")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--updates", type=int, default=5, help="timed updates, after one to warm up")
    settings = parser.parse_args()
    preset = PRESETS["testbed"][1]
    config = dataclasses.replace(
        preset,
        rollout=RolloutConfig(trajectories=settings.trajectories, fraction=0.2, updates=1, batch=settings.micro_batch),
        memory=dataclasses.replace(preset.memory, micro_batch=settings.micro_batch, decode_chunk=settings.micro_batch),
    )
    info = RankInfo.of()
    world = World.start(info, device_of(config, info))
    trainer = Trainer.from_config(config, world=world)
    gradients = trainer.step.parameters

    # The first update is a warm-up.
    for update in range(settings.updates + 1):
        if update <= 1:
            watch = Stopwatch(trainer.components.device)
        watch.time("rollout", lambda: trainer.source.collect(update))  # noqa: B023
        selection = trainer.source.select(update, trainer.slots)
        watch.time("step", lambda: trainer.step(selection))  # noqa: B023
        watch.time("sum", lambda: world.sum_([parameter.grad for parameter in gradients]))
        watch.time("optimizer", trainer.optimizer.update)
        trainer.source.finish()

    # Sums after a barrier do not include waiting for slower ranks.
    alone = Stopwatch(trainer.components.device)
    sums = [torch.randn_like(parameter) for parameter in gradients]
    for _ in range(20):
        world.barrier()
        alone.time("sum", lambda: world.sum_(sums))

    seconds = [[statistics.median(watch.wall[phase]) for phase in PHASES]]
    seconds += [[statistics.median(watch.cpu[phase]) for phase in PHASES]]
    own = torch.tensor([[*wall, sum(wall), min(alone.wall["sum"])] for wall in seconds])
    every = world.all_gather_rows(own[None], torch.tensor([world.rank]), world.size)
    if world.is_main:
        moved = 4 * sum(parameter.numel() for parameter in gradients)
        print(
            f"{device_info()['hardware']}, {trainer.components.device}; {settings.trajectories} trajectories, {moved:,} bytes of gradients"
        )
        names = ("clock", "rank", *(f"{phase}, s" for phase in (*PHASES, "update", "sum alone")))
        rows = [
            (clock, str(rank), *(f"{value:.4f}" for value in every[rank, i].tolist()))
            for i, clock in enumerate(("wall", "CPU"))
            for rank in range(world.size)
        ]
        print("\n".join(markdown_table(names, rows)))
    world.shutdown(0)


if __name__ == "__main__":
    main()
