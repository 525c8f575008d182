"""torch.compile for networks that are differentiated twice: to their input, then to their parameters."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import nn

Compile = Literal["none", "blocks", "whole"]


def allow_compiling() -> None:
    """Set what torch.compile must know of this process before the first compiled call.

    Two backward passes go through one graph, so buffers must not be donated to the first. A network is compiled once for
    each way it is called: adapter on or off, with and without a graph, for its parameters or not, and again for any batch
    size once a second one is seen; more than 64 would be a mistake, and is an error rather than a return to eager.
    """
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def compiled(function: Callable) -> Callable:
    """`function` as one graph; what breaks the graph is an error."""
    allow_compiling()
    return torch.compile(function, fullgraph=True)


def compile_blocks(network: nn.Module, kinds: Iterable[type[nn.Module]]) -> None:
    """Compile each submodule of `network` that is of one of the `kinds`: faster to start than the whole network, since
    equal blocks share a graph, but nothing is fused across them."""
    allow_compiling()
    for module in network.modules():
        if isinstance(module, tuple(kinds)):
            module.compile(fullgraph=True)
