"""A network split over processes with FSDP2 (`torch.distributed.fsdp.fully_shard`), for training all its parameters.

Each process keeps its share of every weight, in the dtype that they are trained in, and of every gradient and moment. To
compute, the weights are gathered whole in the dtype that is computed in, once for as many passes as there are between two
updates; gradients are summed over the processes, and split, once for each micro-batch.

FSDP2 by itself gathers a block before each of its passes, and splits the gradients while `backward` runs. That needs all
processes to make the same passes in the same order, and none to repeat one that ran out of memory. Here a step takes
several vector-Jacobian products through one graph, and processes may have different numbers of micro-batches, of different
sizes: so nothing is sent within a pass.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn import functional

from fastnabla.distributed.world import World

BUCKET = 2**24
"""Elements of gradients, in float32, that are sent at once."""


class ShardedNetwork:
    """Splits a network, in place, along the first dimension of every parameter.

    Args:
        network: with the same weights on every process: a diffusers UNet, each of whose blocks is gathered by itself.
            Its parameters become `DTensor`s.
        world: the processes.
        device: where the network is to be: a CPU, or the GPU that this process uses.
        dtype: what is computed in.
    """

    def __init__(self, network: nn.Module, world: World, device: torch.device, dtype: torch.dtype) -> None:
        mesh = init_device_mesh(device.type, (world.size,))
        precision = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
        for part in (*network.down_blocks, network.mid_block, *network.up_blocks, network):
            fully_shard(part, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
        network.set_reshard_after_backward(False)
        self.network, self.world, self.mesh = network, world, mesh
        self.parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
        self.shards: dict[str, nn.Parameter] = dict(network.named_parameters())
        """The parameters, `DTensor`s, by name; whole or not, the same objects."""

    def gather(self) -> None:
        """Make the weights whole. Every process calls it."""
        for part in self.parts:
            part.unshard()

    def release(self) -> None:
        """Keep only this process's share of the weights."""
        for part in self.parts:
            part.reshard()

    def weights(self) -> list[nn.Parameter]:
        """What the network computes with, in the order of `shards`: leaves of its graphs while it is gathered."""
        return list(self.network.parameters())

    def accumulate(self, gradients: Sequence[Tensor] | None) -> bool:
        """Add the sum of all processes' gradients to the shards' `.grad`, in the shards' dtype.

        Every process calls it equally often: with None when it has no more, until it says that none has.

        Args:
            gradients: of the whole weights, in the order of `shards`.

        Returns:
            Whether any process had some.
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
        """This process's shares of the sums of `gradients`, or of zeros."""
        processes, dtype, device = self.mesh.size(), shards[0].dtype, self.mesh.device_type
        # As `fully_shard` splits: equal numbers of rows, but for the last processes.
        shares = [math.ceil(shard.shape[0] / processes) * shard.shape[1:].numel() for shard in shards]
        whole = torch.zeros(processes, sum(shares), dtype=dtype, device=device)
        if gradients is not None:
            for columns, gradient in zip(whole.split(shares, 1), gradients, strict=True):
                padding = columns.numel() - gradient.numel()
                columns.copy_(functional.pad(gradient.flatten(), (0, padding)).view_as(columns))
        summed = DTensor.from_local(whole, self.mesh, [Partial()]).redistribute(placements=[Shard(0)])
        parts, own = summed.to_local()[0].split(shares), [shard.to_local() for shard in shards]
        return [part[: share.numel()].view_as(share) for part, share in zip(parts, own, strict=True)]


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Their numbers, in groups of `BUCKET` elements or a single parameter."""
    bucket, size = [], 0
    for i, parameter in enumerate(parameters):
        if bucket and size + parameter.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(i)
        size += parameter.numel()
    yield bucket
