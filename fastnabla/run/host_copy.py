"""Copies of nested states on the host, so that training can continue while a checkpoint is written."""

from typing import Any

import torch
from torch import Tensor


def host_copy(state: Any, _made: dict[tuple, Tensor] | None = None) -> Any:
    """Copy `state` to the host, with every tensor in its dictionaries, lists and tuples. Waits for the device.

    Tensors that are the same view of the same storage are copied once. Strides are kept.
    """
    made = {} if _made is None else _made
    if isinstance(state, Tensor):
        part = (state.device, state.untyped_storage().data_ptr(), state.storage_offset(), state.dtype)
        key = (*part, state.shape, state.stride())
        if key not in made:
            made[key] = state.detach().to("cpu", copy=True, memory_format=torch.preserve_format)
        return made[key]
    if isinstance(state, dict):
        return {name: host_copy(value, made) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(host_copy(value, made) for value in state)
    return state


def nbytes(state: Any) -> int:
    """Bytes of all tensors in nested dictionaries, lists and tuples."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(nbytes, values))
