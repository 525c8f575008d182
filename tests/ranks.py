"""Processes of a data-parallel run as forks of one that has everything loaded: importing torch takes seconds."""

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastnabla.distributed import World
from fastnabla.launch import Place


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def begin(folder: Path, size: int, function: Callable[[World], Any]) -> list[int]:
    """Start `size` ranks; their process numbers. Each saves what `function` returns in `folder`.

    Autograd and torch's threads must not have been used with more than one thread before.
    """
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            status = 70
            try:
                torch.set_num_threads(1)
                world = World.start(Place(rank=rank, size=size, local_rank=rank, port=port))
                torch.save(function(world), folder / f"rank-{rank}.pt")
                status = world.leave(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)  # nothing of the test process is to be run a second time
        children.append(child)
    return children


def end(children: list[int], seconds: float = 60) -> list[int]:
    """Wait for all; their exit statuses, negative for a signal that ended them."""
    until, statuses = time.monotonic() + seconds, {}
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses and (found := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > until:
            for child in set(children) - statuses.keys():
                os.kill(child, 9)
            raise AssertionError(f"after {seconds} s only these have ended: {statuses}")
        time.sleep(0.01)
    return [statuses[child] for child in children]


def on_ranks(folder: Path, size: int, function: Callable[[World], Any]) -> list[Any]:
    """What `function` returns on each of `size` ranks: tensors, numbers, lists and dictionaries of them."""
    folder.mkdir(exist_ok=True)
    assert end(begin(folder, size, function)) == [0] * size
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(size)]
