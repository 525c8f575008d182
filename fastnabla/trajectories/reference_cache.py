"""A cache of what the reference network contributes to each transition, for later inner epochs.

This is its guided output o_ref at x and its vector-Jacobian product ``J_refᵀ λ b e_ref``, with
``e_ref = (x' − a x − b o_ref)/σ²``. Both depend on the transition, the sampler and λ, but not on the policy or φ. They are
stored in float32. o_ref is stored after guidance, since the residuals need nothing else of an output pair.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor


class ReferenceCache:
    """Slabs for the transitions of a `TrajectoryBuffer`, on the training device.

    Args:
        capacity, kept, sample_shape: the buffer's.
        with_product: cache the products too.
        device: of the slabs.
    """

    def __init__(
        self, capacity: int, kept: int, sample_shape: tuple[int, ...], with_product: bool, device: torch.device
    ) -> None:
        shape = (capacity * kept, *sample_shape)
        self.kept = kept
        self.output = torch.zeros(shape, device=device)
        self.product = torch.zeros(shape, device=device) if with_product else None
        self.known = torch.zeros(capacity * kept, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs."""
        return sum(slab.nbytes for slab in (self.output, self.product) if slab is not None)

    def forget(self, slots: Tensor) -> None:
        """Forget the transitions of the trajectories in `slots [n]`, on the CPU."""
        self.known.view(-1, self.kept)[slots] = False

    def of(self, index: Tensor) -> "CachedRows":
        """The places of the transitions numbered `index [M]` int64, on the CPU."""
        return CachedRows(cache=self, index=index)

    def state_dict(self) -> dict[str, Any]:
        """Everything in the cache, on the CPU."""
        tensors = {"output": self.output, "product": self.product, "known": self.known}
        return {name: None if tensor is None else tensor.cpu().clone() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` saved."""
        for name, tensor in (("output", self.output), ("product", self.product), ("known", self.known)):
            if tensor is not None:
                tensor.copy_(state[name])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CachedRows:
    """Places of M transitions in a cache."""

    cache: ReferenceCache
    index: Tensor
    """`[M]` int64, on the CPU."""

    def __getitem__(self, rows: Tensor) -> "CachedRows":
        return CachedRows(cache=self.cache, index=self.index[rows])

    def read(self) -> tuple[Tensor, Tensor | None] | None:
        """Guided outputs and products `[M, C, H, W]`, both float32, or None unless all are known. Does not wait for the
        device."""
        if not bool(self.cache.known[self.index].all()):
            return None
        at = self._on_device()
        return self.cache.output[at], None if self.cache.product is None else self.cache.product[at]

    @torch.no_grad()
    def write(self, output: Tensor, product: Tensor | None) -> None:
        """Store guided outputs and, if given, products, `[M, C, H, W]`."""
        at = self._on_device()
        self.cache.output[at] = output.float()
        if product is not None:
            self.cache.product[at] = product.float()
        self.cache.known[self.index] = True

    def _on_device(self) -> Tensor:
        return self.index.to(self.cache.output.device, non_blocking=True)
