"""Shards a network over the ranks with FSDP2 (`torch.distributed.fsdp.fully_shard`), to train all its parameters.

Each rank keeps a shard of every weight, in the training dtype, and of every gradient and optimizer moment. The weights are
gathered in the compute dtype once per update, for all its passes. Gradients are reduce-scattered once per micro-batch.

By default, FSDP2 gathers a block before each of its passes and reduce-scatters during `backward`. That requires all ranks to
run the same passes in the same order, so no rank could repeat a pass that ran out of memory. Here a step takes several
vector-Jacobian products through one graph, and ranks may have different numbers and sizes of micro-batches. So there is no
communication within a pass.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn import functional

from fastnabla.distributed.world import World, collective

BUCKET = 2**24
"""Gradient elements in one reduce-scatter."""


class ShardedNetwork:
    """A network sharded in place along the first dimension of every parameter.

    Args:
        network: a diffusers UNet or transformer with the same weights on every rank. Each of its blocks is an FSDP unit, and its
            parameters become `DTensor`s.
        world: the ranks.
        device: where the network will be: the CPU, or this rank's GPU.
        dtype: compute dtype.
    """

    def __init__(self, network: nn.Module, world: World, device: torch.device, dtype: torch.dtype) -> None:
        mesh = init_device_mesh(device.type, (world.size,))
        precision = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
        blocks = [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
        if (middle := getattr(network, "mid_block", None)) is not None:  # of UNets
            blocks.append(middle)
        for part in (*blocks, network):
            fully_shard(part, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
        network.set_reshard_after_backward(False)
        self.network, self.world, self.mesh = network, world, mesh
        self.parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
        self.shards: dict[str, nn.Parameter] = dict(network.named_parameters())
        """The sharded parameters (`DTensor`s) by name; the same objects whether or not the network is gathered."""

    def gather(self) -> None:
        """Gather the whole weights. Collective."""
        with collective():
            for part in self.parts:
                part.unshard()

    def release(self) -> None:
        """Free the gathered weights, keeping only this rank's shards."""
        for part in self.parts:
            part.reshard()

    def weights(self) -> list[nn.Parameter]:
        """The gathered weights, in the order of `shards`; leaves of the network's graphs."""
        return list(self.network.parameters())

    def accumulate(self, gradients: Sequence[Tensor] | None) -> bool:
        """Add the sum of all ranks' gradients to the shards' `.grad`, in the shards' dtype. Collective.

        A rank that has no gradients left passes None. All ranks keep calling until the result is False.

        Args:
            gradients: of the whole weights, in the order of `shards`; or None.

        Returns:
            Whether any rank had gradients.
        """
        if not self.world.max(int(gradients is not None)):
            return False
        shards = list(self.shards.values())
        for shard in shards:
            if shard.grad is None:
                shard.grad = torch.zeros_like(shard)
        for bucket in _buckets(shards):
            some = None if gradients is None else [gradients[i] for i in bucket]
            sums = self._reduce_scatter([shards[i] for i in bucket], some)
            torch._foreach_add_([shards[i].grad.to_local() for i in bucket], sums)
        return True

    def _reduce_scatter(self, shards: Sequence[DTensor], gradients: Sequence[Tensor] | None) -> list[Tensor]:
        """This rank's shards of the sums of all ranks' `gradients`; None counts as zeros."""
        ranks, dtype, device = self.mesh.size(), shards[0].dtype, self.mesh.device_type
        # As `fully_shard` splits: equal numbers of rows, except on the last ranks.
        sizes = [math.ceil(shard.shape[0] / ranks) * shard.shape[1:].numel() for shard in shards]
        whole = torch.zeros(ranks, sum(sizes), dtype=dtype, device=device)
        if gradients is not None:
            for columns, gradient in zip(whole.split(sizes, 1), gradients, strict=True):
                padding = columns.numel() - gradient.numel()
                columns.copy_(functional.pad(gradient.flatten(), (0, padding)).view_as(columns))
        with collective():
            summed = DTensor.from_local(whole, self.mesh, [Partial()]).redistribute(placements=[Shard(0)])
        parts, local = summed.to_local()[0].split(sizes), [shard.to_local() for shard in shards]
        return [part[: shard.numel()].view_as(shard) for part, shard in zip(parts, local, strict=True)]


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, of which each rank may have a shard. Collective if they do."""
    if not isinstance(tensor, DTensor):
        return tensor
    with collective():
        return tensor.full_tensor()


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of `parameters`, in groups of at most `BUCKET` elements or a single parameter."""
    bucket, size = [], 0
    for i, parameter in enumerate(parameters):
        if bucket and size + parameter.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(i)
        size += parameter.numel()
    yield bucket
