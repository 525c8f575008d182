"""Computes a reward that uses half precision in float32, without changing the reward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

HALF = (torch.bfloat16, torch.float16)


class InFloat32(TorchDispatchMode):
    """Within the context, torch operations take and return float32 in place of bfloat16 and float16.

    Autocast, casts and half-precision weights have no effect on results then. TF32 is not replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replaced: set[torch.dtype] = set()
        """The half-precision types that operations had."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on float32 copies. A view shares memory with its tensor, so it keeps the type."""
        if not func.is_view:
            args, kwargs = tree_map(self._replace, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _replace(self, value: Any) -> Any:
        dtype = value.dtype if isinstance(value, Tensor) else value
        if not isinstance(dtype, torch.dtype) or dtype not in HALF:
            return value
        self.replaced.add(dtype)
        return value.float() if isinstance(value, Tensor) else torch.float32
