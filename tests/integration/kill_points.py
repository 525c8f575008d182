"""Where a run can be killed: each point makes one call of a function fatal, in a fork that trains."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastnabla.distributed.world import World
from fastnabla.run import checkpoint, save_weights, tracker
from fastnabla.training.trainer import Trainer
from fastnabla.utils import durable

Where = Callable[..., bool]
"""Whether a call with these arguments counts."""


def die() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_call(owner: object, name: str, call: int, after: bool, where: Where = lambda *_, **__: True) -> None:
    """Die in call number `call`, from 0, of the function `owner.name`: before the call, or `after` it."""
    function, calls = getattr(owner, name), []

    def dying(*arguments: Any, **options: Any) -> Any:
        if not where(*arguments, **options):
            return function(*arguments, **options)
        calls.append(None)
        if len(calls) > call and not after:
            die()
        value = function(*arguments, **options)
        if len(calls) > call:
            die()
        return value

    setattr(owner, name, dying)


def die_in_record(call: int) -> None:
    """Die after half a line of metrics.jsonl was written."""
    append, calls = tracker.Tracker._append, []

    def dying(self, name, record):
        calls.append(None)
        if len(calls) > call and name == "metrics.jsonl":
            line = json.dumps(record)
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(line[: len(line) // 2])
            die()
        append(self, name, record)

    tracker.Tracker._append = dying


def die_in_write(call: int) -> None:
    """Die after half a block of a file was written."""
    write, calls = durable._Digesting.write, []

    def dying(self, data):
        calls.append(None)
        if len(calls) > call:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die()
        return write(self, data)

    durable._Digesting.write = dying


def _moves(folder: str) -> Where:
    """Whether a rename is of something in the temporary folder `folder`, or of that folder."""
    return lambda source, target: folder in Path(source).parts


def _moves_checkpoint(source: Path, target: Path) -> bool:
    return Path(source).name.startswith(".update-")


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """A point at which a process dies.

    Args:
        calls: an upper bound of the number of calls in a run.
        arm: makes call number `call` fatal, given the trainer, `call`, and whether to die after the call.
    """

    calls: int
    arm: Callable[[Trainer, int, bool], None]


POINTS = {
    "samples of the pretrained model": Point(2, lambda t, c, after: die_in_call(t.evaluator, "images", c, after)),
    "rollout": Point(8, lambda t, c, after: die_in_call(type(t.table), "rows", c, after)),
    "append to the buffer": Point(6, lambda t, c, after: die_in_call(type(t.components.state.buffer), "append", c, after)),
    "micro-batch": Point(6, lambda t, c, after: die_in_call(t.step, "gradients", c, after)),
    "optimizer": Point(5, lambda t, c, after: die_in_call(t.optimizer, "update", c, after)),
    "average of the weights": Point(5, lambda t, c, after: die_in_call(t.ema, "update", c, after)),
    "half a line of metrics.jsonl": Point(8, lambda t, c, after: die_in_record(c)),
    "evaluation": Point(4, lambda t, c, after: die_in_call(t.evaluator, "measure", c, after)),
    "best weights, written": Point(2, lambda t, c, after: die_in_call(shutil, "copyfile", c, after)),
    "best weights, moved": Point(6, lambda t, c, after: die_in_call(os, "replace", c, after, _moves(".weights.partial"))),
    "checkpoint, copied": Point(3, lambda t, c, after: die_in_call(checkpoint, "host_copy", c, after)),
    "checkpoint, written by a thread": Point(2000, lambda t, c, after: die_in_write(c)),
    "checkpoint, flushed": Point(30, lambda t, c, after: die_in_call(os, "fsync", c, after)),
    "checkpoint, renamed": Point(3, lambda t, c, after: die_in_call(os, "replace", c, after, _moves_checkpoint)),
    "checkpoint, older one removed": Point(2, lambda t, c, after: die_in_call(durable.shutil, "rmtree", c, after)),
}  # fmt: skip
"""By name, points of a run of one process."""

SPILLED = {
    "buffer, copied into a checkpoint": Point(
        3, lambda t, c, after: die_in_call(type(t.components.state.buffer), "state_dict", c, after)
    ),
    "buffer, written with a checkpoint": Point(2000, lambda t, c, after: die_in_write(c)),
    "rollout that is sampled ahead": Point(12, lambda t, c, after: die_in_call(type(t.table), "rows", c, after)),
}
"""Those of a run whose buffer is in host memory, holds an older rollout and is saved with each checkpoint."""

SHARDED = {
    "2 processes: micro-batch": Point(3, lambda t, c, after: die_in_call(t.step, "gradients", c, after)),
    "2 processes: gradients, summed": Point(3, lambda t, c, after: die_in_call(World, "sum_", c, after)),
    "2 processes: optimizer": Point(3, lambda t, c, after: die_in_call(t.optimizer, "update", c, after)),
    "2 processes: shards of a checkpoint": Point(
        3, lambda t, c, after: die_in_call(checkpoint, "write_tensors", c, after)
    ),
    "2 processes: checkpoint, flushed": Point(8, lambda t, c, after: die_in_call(os, "fsync", c, after)),
    "2 processes: weights, gathered": Point(2, lambda t, c, after: die_in_call(save_weights, "save_policy", c, after)),
    "2 processes: evaluation": Point(4, lambda t, c, after: die_in_call(t.evaluator, "images", c, after)),
}
"""Those of one of two processes, which share the weights of full finetuning."""
