"""What full finetuning trains, in a checkpoint: each process writes its share, and any number of processes read it back.

torch.distributed.checkpoint does it. Its own format keeps its index in a pickle, which can run anything when it is read;
its storage in safetensors, used here, keeps the same facts as JSON in the files' headers. A file has one process's rows of
each tensor; which rows they are, the header says.
"""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from fastnabla.models.policy import Policy
from fastnabla.optim.ema import WeightAverage
from fastnabla.optim.optimizer import Optimizer

# For good, since a checkpoint may be written by a thread, and filters are the process's.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

FOLDER = "weights"
"""Of a checkpoint, with the files."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW; those of the 8-bit algorithms cannot be split, and stay with the rest of the state."""
NAMES = "large"
"""Entry of the state that names the tensors that are in the folder."""


@dataclasses.dataclass(frozen=True, slots=True)
class LargeTensors:
    """The tensors of a run's state that are as large as what is trained: parameters, their average, their moments.

    Args:
        policy, optimizer, ema: the run's.
    """

    policy: Policy
    optimizer: Optimizer
    ema: WeightAverage | None

    def take_out(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state as `fastnabla.run.checkpoint.TrainState.state_dict` gives it, without them, and they by name."""
        large = self._parameters()
        moments = dict(state["optimizer"]["state"])
        for number, name in enumerate(self.policy.trained()):
            own = moments.get(number, {})
            large |= {f"optimizer.{name}.{moment}": own[moment] for moment in MOMENTS if moment in own}
            if own:
                moments[number] = {part: value for part, value in own.items() if part not in MOMENTS}
        optimizer = state["optimizer"] | {"state": moments}
        ema = state["ema"] | ({"average": {}} if self.ema is not None else {})
        rest = state | {"policy": {}, "optimizer": optimizer, "ema": ema, NAMES: list(large)}
        return rest, large

    @torch.no_grad()
    def put_back(self, state: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The state that `take_out` left, with the tensors that are in `folder`; parameters and their average have these
        values at once. If the parameters are sharded, every process calls it.

        Raises:
            KeyError: a tensor is missing.
            OSError: a file cannot be read.
            ValueError: a tensor has another shape.
        """
        parameters = self.policy.trained()
        large, moments = self._parameters(), dict(state["optimizer"]["state"])
        for number, (name, parameter) in enumerate(parameters.items()):
            own = {m: torch.zeros_like(parameter) for m in MOMENTS if f"optimizer.{name}.{m}" in state[NAMES]}
            large |= {f"optimizer.{name}.{moment}": value for moment, value in own.items()}
            if own:
                moments[number] = moments[number] | own
        if missing := set(large) ^ set(state[NAMES]):
            raise KeyError(min(missing))
        read_tensors(folder, large)
        average = {"average": self.ema.average} if self.ema is not None else {}
        return state | {
            "policy": {name: parameter.detach() for name, parameter in parameters.items()},
            "optimizer": state["optimizer"] | {"state": moments},
            "ema": state["ema"] | average,
        }

    def _parameters(self) -> dict[str, Tensor]:
        large = {f"policy.{name}": parameter.detach() for name, parameter in self.policy.trained().items()}
        average = self.ema.average if self.ema is not None else {}
        return large | {f"ema.{name}": value for name, value in average.items()}


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` into `folder`, flushed to the disk. If they are sharded, every process calls it; the folder is on a
    file system that they share, and nobody writes into it before rank 0, too, has come here.

    Raises:
        OSError: a process cannot write. They all raise it.
    """
    if _are_sharded(tensors):
        dist.barrier()
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _together(lambda alone: dcp.save(tensors, storage_writer=writer, no_dist=alone), tensors)


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Give `tensors` the values that `write_tensors` wrote, by any number of processes. If they are sharded, every process
    calls it.

    Raises:
        OSError: a file cannot be read.
        ValueError: one has another shape, or is not there.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    _together(lambda alone: dcp.load(tensors, storage_reader=reader, no_dist=alone), tensors)


def _together(operation: Callable[[bool], Any], tensors: dict[str, Tensor]) -> None:
    """Run an operation of torch.distributed.checkpoint, on all processes or alone; raise what one of them raised."""
    try:
        operation(not _are_sharded(tensors))
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise cause from None
        raise ValueError(str(cause)) from error


def _are_sharded(tensors: dict[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())
