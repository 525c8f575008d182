"""The choice between Triton kernels and plain torch.

For the objective, both have the same arguments and results. `gaussian.py` and `balance.py` are the specification in plain
torch; `fused.py` calls the kernels of `fastnabla.kernels`.
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
    """The operations to use on `device` for states of `dtype`; see `kernels_compute`."""
    if not kernels_compute("objective", backend, device, dtype):
        return PLAIN
    from fastnabla.objective import fused

    return fused.FUSED


def kernels_compute(what: str, backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels compute `what`, for tensors of `dtype` on `device`. The choice is logged once.

    "auto" selects the kernels if they can run: on CUDA, with Triton installed, for dtypes below float64.

    Raises:
        ValueError: `backend` is unknown, or it is "triton" and the kernels cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend = {backend!r}: expected one of {get_args(Backend)}")
    obstacle = _obstacle(device, dtype, interpret=backend == "triton")
    if backend == "triton" and obstacle:
        raise ValueError(f"backend = 'triton': {obstacle}. Use backend='torch', or 'auto' to take what can run.")
    if backend == "torch" or obstacle:
        _say(f"{what}: plain torch, {'as asked' if backend == 'torch' else obstacle}")
        return False
    _say(f"{what}: Triton kernels")
    return True


def _obstacle(device: torch.device, dtype: torch.dtype, interpret: bool) -> str | None:
    """Why the kernels cannot run, or None if they can. On a CPU they run in Triton's interpreter, if `interpret`."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype == torch.float64:
        return "the kernels compute in float32, the tensors are float64"
    if device.type != "cuda" and not (interpret and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the kernels need CUDA tensors, the tensors are on {device.type}"
    return None


@functools.cache
def _say(message: str) -> None:
    logging.getLogger("fastnabla").info(message)
