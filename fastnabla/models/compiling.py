"""torch.compile for networks with two backward passes through one graph: to the input, then to the parameters."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor, nn
from torch._dynamo.callback import CallbackArgs, callback_handler, on_compile_end, on_compile_start
from torch._dynamo.utils import counters, cumulative_time_spent_ns
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from fastnabla.distributed.beacon import BEACON

Compile = Literal["none", "blocks", "whole"]
MAX_GRAPHS = 1024


class CompileCost(NamedTuple):
    """Graphs that torch.compile has built in this process, and the seconds it took."""

    graphs: int
    seconds: float


def allow_compiling() -> None:
    """Configure torch.compile for this process. Call it before the first compiled call.

    - Two backward passes go through one graph, so the first must not reuse its buffers (`donated_buffer`).
    - Guards must check whether a weight requires a gradient. torch 2.11 skips the guards of a module's parameters unless a
      parameter is replaced; a graph compiled while weights were constant would be reused for training, without gradients.
    - The recompile limit counts graphs by line of source, and all blocks of a class share their lines. Each shape of a block
      needs a graph for each number of rows and, without a LoRA, for each kind of call (gradients to the input, to the
      weights, none). Stable Diffusion 1.5 has 15 shapes of residual blocks: 75 graphs without a LoRA. More than `MAX_GRAPHS`
      would be a bug, and raises an error instead of falling back to eager.
    - Compiled code is kept in `compiled_code_folder` between runs. torch's default is in the folder for temporary files.
    - Compiling takes minutes, which do not count as a hang (`fastnabla.distributed.beacon`).
    """
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MAX_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled_code_folder())
    if _begin not in callback_handler.start_callbacks:
        on_compile_start(_begin)
        on_compile_end(_end)


def compiled_code_folder() -> Path:
    """`TORCHINDUCTOR_CACHE_DIR`, or `fastnabla/compiled/avx512` in the user's cache (`XDG_CACHE_HOME`, or ~/.cache).

    Each CPU instruction set has its folder, because machines may share a home. torch finds kept C++ code by a key without the
    instruction set: code for vectors of 16 numbers, compiled for vectors of 8, returns what happens to be in memory.

    torch sets an unset variable to its own default, so that folder counts as not named.
    """
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named and named != os.path.abspath(default_cache_dir()):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastnabla" / "compiled" / torch.backends.cpu.get_cpu_capability().lower()


def _begin(_: CallbackArgs) -> None:
    BEACON.begin_excused()


def _end(_: CallbackArgs) -> None:
    BEACON.end_excused()


def compiled(function: Callable) -> Callable:
    """`function` compiled to one graph for each shape of its inputs. A graph break is an error."""
    allow_compiling()
    return torch.compile(function, fullgraph=True, dynamic=False)


def compile_blocks(network: nn.Module, kinds: Iterable[type[nn.Module]]) -> None:
    """Compile each submodule of `network` that is one of the `kinds`.

    This compiles faster than the whole network, because equal blocks share a graph, but nothing is fused across blocks.
    """
    allow_compiling()
    for module in network.modules():
        if isinstance(module, tuple(kinds)):
            module.compile(fullgraph=True, dynamic=False)


def compile_cost() -> CompileCost:
    """The cost of compilation in this process so far."""
    phases = ("entire_frame_compile", "entire_backward_compile")
    nanoseconds = sum(cumulative_time_spent_ns.get(phase, 0) for phase in phases)
    return CompileCost(counters["stats"]["unique_graphs"], nanoseconds / 1e9)


def pad_rows(tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
    """`tensors` padded to `rows` rows by repeating their last row."""
    return [
        tensor
        if (missing := rows - len(tensor)) == 0
        else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
        for tensor in tensors
    ]
