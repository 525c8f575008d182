"""Processes of a data-parallel run as forks of one that has everything loaded: importing torch takes seconds.

Threads do not survive a fork: the test process calls ``torch.set_num_threads(1)`` first.
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

from fastnabla import train
from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.world import World


def environments(size: int) -> list[dict[str, str]]:
    """What torchrun would set for each rank."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(listening.getsockname()[1])}
    return [meet | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(size)} for r in range(size)]


def begin(size: int, function: Callable[[], int]) -> list[int]:
    """Start a process for each rank, which ends with the status that `function` returns there; their numbers."""
    children = []
    for environment in environments(size):
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.environ |= environment
                faulthandler.register(signal.SIGUSR2, file=2)
                status = function()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)  # nothing of the test process is to be run a second time
        children.append(child)
    return children


def end(children: list[int], seconds: float = 300) -> list[int]:
    """Wait for all; their exit statuses, negative for a signal that ended them."""
    until, statuses = time.monotonic() + seconds, {}
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses and (found := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > until:
            for child in set(children) - statuses.keys():
                os.kill(child, signal.SIGUSR2)  # where it is, goes where its stderr goes
                time.sleep(0.5)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"after {seconds} s only these have ended: {statuses}")
        time.sleep(0.01)
    return [statuses[child] for child in children]


def on_ranks(folder: Path, size: int, function: Callable[[World], Any]) -> list[Any]:
    """What `function` returns on each of `size` ranks: tensors, numbers, lists and dictionaries of them."""
    folder.mkdir(exist_ok=True)

    def run() -> int:
        world = World.start(RankInfo.of())
        torch.save(function(world), folder / f"rank-{world.rank}.pt")
        return world.shutdown(0)

    assert end(begin(size, run)) == [0] * size
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(size)]


def trained(arguments: list[str], prepare: Callable[[int], None] = lambda rank: None) -> int:
    """`python -m fastnabla.train` with these arguments, in this process, its output in rank-N.txt; the exit status.

    Args:
        arguments: of the command line.
        prepare: is called with the rank before.
    """
    rank = os.environ.get("RANK", "0")
    with open(f"rank-{rank}.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # pytest has its own
    prepare(int(rank))
    return train.main(arguments)
