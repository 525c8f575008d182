"""Runs the ranks of a data-parallel run as forks of the test process, because importing torch takes seconds.

Threads do not survive a fork, so a rank computes with one.
"""

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig

from fastnabla import train
from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.world import World


def environments(size: int) -> list[dict[str, str]]:
    """The environment variables that torchrun would set for each rank."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        master = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(listening.getsockname()[1])}
    return [master | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(size)} for r in range(size)]


def begin(size: int, function: Callable[[], int]) -> list[int]:
    """Start a process for each rank that calls `function` and exits with the status it returns; the process ids."""
    children = []
    for environment in environments(size):
        child = os.fork()
        if child == 0:
            status = 70
            try:
                torch.set_num_threads(1)
                os.environ |= environment
                faulthandler.register(signal.SIGUSR2, file=2)
                status = function()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)  # skip the test process's cleanup
        children.append(child)
    return children


def end(children: list[int], seconds: float = 300) -> list[int]:
    """Wait for all processes; their exit statuses, negative for a fatal signal."""
    until, statuses = time.monotonic() + seconds, {}
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses and (found := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > until:
            for child in set(children) - statuses.keys():
                os.kill(child, signal.SIGUSR2)  # prints its traceback to stderr
                time.sleep(0.5)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"after {seconds} s only these processes have ended: {statuses}")
        time.sleep(0.01)
    return [statuses[child] for child in children]


def on_ranks(folder: Path, size: int, function: Callable[[World], Any]) -> list[Any]:
    """The results of `function` on each of `size` ranks: tensors, numbers, and lists or dictionaries of them."""
    folder.mkdir(exist_ok=True)

    def run() -> int:
        world = World.start(RankInfo.of())
        torch.save(function(world), folder / f"rank-{world.rank}.pt")
        return world.shutdown(0)

    assert end(begin(size, run)) == [0] * size
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(size)]


def trained(arguments: list[str], prepare: Callable[[int], None] = lambda rank: None) -> int:
    """Run `python -m fastnabla.train` in this process, with its output in rank-N.txt; the exit status.

    Args:
        arguments: of the command line.
        prepare: called with the rank before training.
    """
    rank = os.environ.get("RANK", "0")
    with open(f"rank-{rank}.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # pytest replaces them
    prepare(int(rank))
    return train.main(arguments)


def restarting_ranks() -> LaunchConfig:
    """Two ranks on this machine, forked by torchrun's agent, which restarts them once."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        monitor_interval=0.1,
        start_method="fork",
    )
