"""Memory traffic of operations, executed one by one: what each reads and writes."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MovedBytes(TorchDispatchMode):
    """`total` bytes that the operations within the context read and wrote, of real or fake tensors.

    An operation reads each of its arguments once and writes its results once. Views move nothing; of a broadcast argument
    what is in memory counts. What a kernel reads again, or keeps for itself, is not seen, nor is what stays in a cache.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        read, written = _tensors((args, kwargs)), _tensors(result)
        known = {_place(tensor) for tensor in read}
        only_views = not operation._schema.is_mutable and all(_place(tensor) in known for tensor in written)
        if read and not only_views:
            self.total += sum(map(_nbytes, read)) + sum(map(_nbytes, written))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
