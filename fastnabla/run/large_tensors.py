"""The large tensors of full finetuning in a checkpoint. Each process writes its shard; any number of processes can read them.

They are written by torch.distributed.checkpoint in its safetensors format, which keeps the index as JSON in the files' headers.
Its default format keeps the index in a pickle, which can run arbitrary code when it is read. A file has one process's rows of
each tensor; its header says which.
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
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from fastnabla.distributed.world import collective
from fastnabla.models.policy import Policy
from fastnabla.optim.ema import WeightAverage
from fastnabla.optim.optimizer import Optimizer
from fastnabla.utils.safetensors_file import read_header

# Set once: filters belong to the process, and a checkpoint may be written by a thread.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

FOLDER = "weights"
"""Folder of a checkpoint that holds the files."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments. Those of the 8-bit algorithms cannot be sharded; they stay with the rest of the state."""
NAMES = "large"
"""Entry of the state that lists the tensors in the folder."""


@dataclasses.dataclass(frozen=True, slots=True)
class LargeTensors:
    """The large tensors of a run's state: the trained parameters, their average and their moments.

    Args:
        policy, optimizer, ema: the run's.
    """

    policy: Policy
    optimizer: Optimizer
    ema: WeightAverage | None

    def take_out(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Split the state from `fastnabla.run.state.TrainState.state_dict` into the rest and the large tensors by name."""
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
        """Read the large tensors from `folder`, and add them to the `state` that `take_out` left.

        Parameters and their average are overwritten in place. Collective if the parameters are sharded.

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
    """Write `tensors` into `folder`, and flush them to the disk.

    Collective if they are sharded. The folder must then be on a shared file system; no process writes before rank 0 has called
    this too.

    Raises:
        OSError: a process cannot write. All processes raise it.
    """
    if _are_sharded(tensors):
        with collective():
            dist.barrier()
    else:  # safetensors takes no channels-last weights
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _together(lambda alone: dcp.save(tensors, storage_writer=writer, no_dist=alone), tensors)


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read into `tensors` what `write_tensors` wrote, from any number of processes. Collective if they are sharded.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged, or a tensor is missing or has another shape.
    """
    reader = _CheckedReader(str(folder))
    _together(lambda alone: dcp.load(tensors, storage_reader=reader, no_dist=alone), tensors)


class _CheckedReader(dcp.HuggingFaceStorageReader):
    """Names the file if one is damaged."""

    def read_metadata(self) -> Metadata:
        for file in sorted(Path(self.path).glob("*.safetensors")):
            read_header(file)
        return super().read_metadata()


def _together(operation: Callable[[bool], Any], tensors: dict[str, Tensor]) -> None:
    """Run an operation of torch.distributed.checkpoint, on all processes if sharded. Raises what one of them raised."""
    try:
        operation(not _are_sharded(tensors))
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise cause from None
        raise ValueError(str(cause)) from error


def _are_sharded(tensors: dict[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())
