"""torch.compile for networks that are differentiated twice: to their input, then to their parameters."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor, nn
from torch._dynamo.utils import counters, cumulative_time_spent_ns

Compile = Literal["none", "blocks", "whole"]
MOST_GRAPHS = 1024


class CompileCost(NamedTuple):
    """What torch.compile has done in this process."""

    graphs: int
    seconds: float


def allow_compiling() -> None:
    """Set what torch.compile must know of this process before the first compiled call.

    - Two backward passes go through one graph, so buffers must not be donated to the first.
    - Whether a weight is trained must be guarded. torch 2.11 skips the guards of a module's parameters as long as no
      parameter is replaced, so that a graph made while weights are constant is used again when they are trained, and
      gives no gradient.
    - Graphs are counted by line of source, and blocks of one class share it: each of their shapes has its own, for each
      number of rows and, without a LoRA, for each way they are called (gradients to the input, to the weights, none).
      Stable Diffusion 1.5 has 15 shapes of a residual block, so 75 graphs without a LoRA. More than `MOST_GRAPHS` would be
      a mistake, and is an error rather than a return to eager.
    """
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def compiled(function: Callable) -> Callable:
    """`function` as one graph for each of its inputs' shapes; what breaks the graph is an error."""
    allow_compiling()
    return torch.compile(function, fullgraph=True, dynamic=False)


def compile_blocks(network: nn.Module, kinds: Iterable[type[nn.Module]]) -> None:
    """Compile each submodule of `network` that is of one of the `kinds`: faster to start than the whole network, since
    equal blocks share a graph, but nothing is fused across them."""
    allow_compiling()
    for module in network.modules():
        if isinstance(module, tuple(kinds)):
            module.compile(fullgraph=True, dynamic=False)


def compile_cost() -> CompileCost:
    """Graphs compiled by this process so far, and the seconds that it took."""
    phases = ("entire_frame_compile", "entire_backward_compile")
    nanoseconds = sum(cumulative_time_spent_ns.get(phase, 0) for phase in phases)
    return CompileCost(counters["stats"]["unique_graphs"], nanoseconds / 1e9)


def pad_rows(tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
    """`tensors` with their last row repeated until they have `rows` rows."""
    return [
        tensor
        if (missing := rows - len(tensor)) == 0
        else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
        for tensor in tensors
    ]
