"""Times the objective's operations: the published algorithm in eager torch, plain torch compiled, and fastnabla.

An operation is timed forward (saving for the backward pass), backward (alone, from a retained graph), or both; two operations
have no backward pass. Before a provider is timed, its values and gradients are compared with plain torch (`TOLERANCE`). If
they differ, the benchmark fails.

On CUDA: outputs and flow are bfloat16, states and scores float32, guidance is 5, and all terms are on. Not every combination
is run:

- published eager and fastnabla, whole pass: all shapes, batches of 4, 16, 64, 256;
- the same, forward and backward separately: batch 64;
- compiled plain (`torch.compile`, `dynamic=False`), whole pass: Stable Diffusion 1.5 at all batches, the others at 64
  and 16.

Stable Diffusion 1.5 at 64 and 16 comes first, also compiled, in case time runs out.

On a CPU: 4 × 32 × 32, batch 4, float32. There fastnabla is plain torch, which `select("auto", …)` chooses.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from bench import measure
from bench.operations import (
    CUDA,
    DEVICE,
    DTYPE,
    OPERATIONS,
    bytes_moved,
    disagreement,
    runner,
    tensors,
    whole,
)
from bench.published import PUBLISHED
from fastnabla.objective.backend import select
from fastnabla.objective.ops import PLAIN, ObjectiveOps

SHAPES = {"SD 1.5": (4, 64, 64), "SDXL": (4, 128, 128), "SD3": (16, 128, 128)} if CUDA else {"small": (4, 32, 32)}
BATCHES = (64, 16, 4, 256) if CUDA else (4,)
EAGER, COMPILE, OURS = "published eager", "compiled plain", "fastnabla"


class Case(NamedTuple):
    """One benchmark."""

    operation: str
    shape: str
    batch: int
    direction: str
    """forward, backward or both."""
    provider: str


def cases() -> Iterator[Case]:
    """All benchmarks, in order."""
    sizes = list(itertools.product(SHAPES, BATCHES))
    for some in (sizes[:2], sizes[2:]):
        for (shape, batch), operation in itertools.product(some, OPERATIONS):
            apart = ("forward", "backward") if whole(operation) == "both" and batch == BATCHES[0] else ()
            for direction, provider in itertools.product((whole(operation), *apart), (EAGER, OURS)):
                yield Case(operation, shape, batch, direction, provider)
        for (shape, batch), operation in itertools.product(some if CUDA else (), OPERATIONS):
            if shape == "SD 1.5" or batch in BATCHES[:2]:
                yield Case(operation, shape, batch, whole(operation), COMPILE)


def operations_of(provider: str) -> ObjectiveOps:
    if provider == COMPILE:
        torch._dynamo.reset()  # compile each case afresh: no recompilation limit, no dynamic shapes
        compiled = {name: torch.compile(getattr(PLAIN, name), dynamic=False) for name in OPERATIONS}
        return PLAIN._replace(name="plain torch, compiled by torch.compile", **compiled)
    return PUBLISHED if provider == EAGER else select("auto", DEVICE)


@pytest.fixture(autouse=True)
def stream() -> Iterator[None]:
    """On CUDA, run on a non-default stream, which can be captured in a graph."""
    with measure.own_stream():
        yield


@pytest.fixture
def agreeing(case: Case) -> tuple[ObjectiveOps, float]:
    """The provider, after its values and gradients were found to agree with plain torch, and their difference."""
    operations = operations_of(case.provider)
    try:
        error = disagreement(operations, case.operation, tensors(SHAPES[case.shape], case.batch))
    except torch.OutOfMemoryError:
        pytest.skip("not enough memory")
    assert error < 1, f"{case.provider} differs from plain torch by {error:.3g} times the tolerance"
    return operations, error


@pytest.mark.parametrize("case", cases(), ids=lambda case: "-".join(map(str, case)).replace(" ", "_"))
def bench_kernel(benchmark, case: Case, agreeing: tuple[ObjectiveOps, float]) -> None:
    operations, error = agreeing
    shape = SHAPES[case.shape]
    run = runner(operations, case.operation, tensors(shape, case.batch), case.direction)
    benchmark.group = (
        f"{case.operation}, {case.direction}, {case.shape} {'×'.join(map(str, shape))}, batch {case.batch}"
    )
    benchmark.group += ", CUDA bfloat16" if CUDA else f", CPU float32 ({OURS} is plain torch here)"
    benchmark.pedantic(measure.synchronised(run), rounds=30 if CUDA else 100, warmup_rounds=5)
    if benchmark.stats is None:  # --benchmark-disable
        return
    info: dict[str, Any] = {}
    counts = {"launches": measure.launches, "peak MiB": measure.peak_memory}
    for name, count in {**counts, "cold us": measure.time_cuda, "graph us": measure.time_graph}.items():
        try:
            info[name] = count(run)
        except (RuntimeError, OSError, ValueError) as reason:  # such as an operation that a graph cannot capture
            info |= {name: None, f"no {name}": str(reason).partition("\n")[0]}
    microseconds = info["graph us"] or info["cold us"] or 1e6 * benchmark.stats.stats.median
    moved = bytes_moved(case.operation, shape, case.batch, case.direction, DTYPE.itemsize)
    copy = measure.copy_bandwidth(DEVICE)
    benchmark.extra_info |= {
        **case._asdict(),
        "elements": shape,
        "computed by": operations.name,
        "output dtype": str(DTYPE).removeprefix("torch."),
        "difference / tolerance": error,
        "bytes": moved,
        "GB/s": moved / microseconds / 1e3,
        "copy GB/s": copy,
        "share of copy": moved / microseconds / 1e3 / copy,
        **info,
        "device": measure.device_info(),
    }
