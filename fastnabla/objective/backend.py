"""The choice of what computes the objective between the network passes: Triton kernels or plain torch.

Both have the same arguments and results. `gaussian.py` and `balance.py` are the specification in plain torch; `fused.py`
calls the kernels of `fastnabla.kernels`.
"""

import functools
import importlib.util
import logging
import os
from typing import get_args

import torch

from fastnabla.objective.ops import PLAIN, ObjectiveOps
from fastnabla.objective.settings import Backend


def select(backend: Backend, device: torch.device, dtype: torch.dtype = torch.float32) -> ObjectiveOps:
    """The operations to use on `device` for states of `dtype`. The choice is logged once.

    "auto" selects the kernels if they can run: on CUDA, with Triton installed, for states below float64.

    Raises:
        ValueError: `backend` is unknown, or it is "triton" and the kernels cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend = {backend!r}: expected one of {get_args(Backend)}")
    obstacle = _obstacle(device, dtype, interpret=backend == "triton")
    if backend == "triton" and obstacle:
        raise ValueError(f"backend = 'triton': {obstacle}. Use backend='torch', or 'auto' to take what can run.")
    if backend == "torch" or obstacle:
        _say(f"plain torch, {'as asked' if backend == 'torch' else obstacle}")
        return PLAIN
    _say("Triton kernels")
    from fastnabla.objective import fused

    return fused.FUSED


def _obstacle(device: torch.device, dtype: torch.dtype, interpret: bool) -> str | None:
    """Why the kernels cannot run, or None if they can. On a CPU they run in Triton's interpreter, if `interpret`."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype == torch.float64:
        return "the kernels compute in float32, the states are float64"
    if device.type != "cuda" and not (interpret and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the kernels need CUDA tensors, the states are on {device.type}"
    return None


@functools.cache
def _say(what: str) -> None:
    logging.getLogger("fastnabla").info("objective: %s", what)
