"""Whether saved tensors are those that they are to replace."""

from collections.abc import Mapping

from torch import Tensor


def require_same_tensors(saved: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Check that `saved` has the names and shapes of `needed`; `Tensor.copy_` would stretch a smaller tensor.

    Raises:
        ValueError: a name or a shape differs.
    """
    if saved.keys() != needed.keys():
        raise ValueError(
            f"it has {len(saved)} tensors and the policy has {len(needed)}; {len(saved.keys() ^ needed.keys())} names occur in "
            "only one of them"
        )
    for name, tensor in needed.items():
        if saved[name].shape != tensor.shape:
            raise ValueError(f"{name!r} has the shape {tuple(saved[name].shape)} instead of {tuple(tensor.shape)}")
