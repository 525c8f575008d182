"""Memory that operations allocate and memory traffic that they cause, counted by intercepting every torch operation.

Both counters also work on fake tensors, so a computation can be measured without being run.
"""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts memory in use: `live` is what operations within the context allocated and has not been freed, `peak` its
    maximum.

    Only results of operations are counted. A kernel's internal workspace is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._seen.update(tensor.untyped_storage() for tensor in _tensors((args, kwargs)))
        result = operation(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in _tensors(result)):
            if storage not in self._seen:
                self._seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)


class MovedBytes(TorchDispatchMode):
    """Counts memory traffic: `total` is the bytes that operations within the context read and wrote.

    Each operation reads every argument once and writes every result once, as in eager execution. Views move nothing. A
    broadcast argument counts with its size in memory. Repeated reads within a kernel, its workspace, and cache hits are
    not modelled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        read, written = _tensors((args, kwargs)), _tensors(result)
        storages = {_storage_id(tensor) for tensor in read}
        only_views = not operation._schema.is_mutable and all(_storage_id(tensor) in storages for tensor in written)
        if read and not only_views:
            for tensor in (*read, *written):
                self._add(_nbytes(tensor))
        return result

    def _add(self, nbytes: int) -> None:
        self.total += nbytes


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
