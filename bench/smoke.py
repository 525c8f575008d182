"""One call of each operation of the kernels and the buffer, on the device: `python -m bench.smoke`.

Each result is compared with plain torch's. The cases are always the same, so that compute-sanitizer can check them too.
"""

import functools
import sys
import traceback
from collections.abc import Callable

import torch

from bench import rows
from bench.operations import CUDA, DEVICE, OPERATIONS, disagreement, tensors
from fastnabla.models.group_norm_silu import PLAIN
from fastnabla.models.group_norm_silu import select as select_norm
from fastnabla.objective.backend import select
from fastnabla.trajectories import buffer_torch
from fastnabla.trajectories.buffer import TrajectoryBuffer

TRAJECTORIES, STEPS, SHAPE = 3, 5, (4, 8, 8)
KEPT = torch.tensor([[4, 0], [4, 1], [4, 3]])


def kernel(operation: str) -> None:
    operations = select("triton" if CUDA or rows.is_dry() else "auto", DEVICE)
    error = disagreement(operations, operation, tensors(SHAPE, 4))
    assert error < 1, f"differs from plain torch by {error:.2g} times the tolerance"


def normalisation() -> None:
    """Of 156 positions and 96 channels, so that tiles end within images and within groups."""
    normal = functools.partial(torch.randn, 2, 96, 12, 13, device=DEVICE)
    x, gradient, skip = (normal().to(memory_format=torch.channels_last) for _ in range(3))
    norm = (*torch.randn(2, 96, device=DEVICE).unbind(), 4, 1e-6)
    found = []
    for by in (select_norm("triton" if CUDA or rows.is_dry() else "auto", DEVICE, x.dtype), PLAIN):
        y, mean, rstd = by.forward(x, *norm)
        with torch.no_grad():
            found.append((y, by.backward(gradient.clone(), x, mean, rstd, *norm, skip)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def stored(storage: str, block: int | None = None) -> None:
    """Gathered transitions are those that were appended. With outputs in 8 bits they are bit for bit plain torch's."""
    kept = KEPT.shape[1]
    buffer = TrajectoryBuffer(TRAJECTORIES, STEPS, kept, SHAPE, device=DEVICE, storage=storage, output_block=block)
    x = torch.randn(TRAJECTORIES, STEPS + 1, *SHAPE, device=DEVICE)
    output = torch.randn(TRAJECTORIES, STEPS, *SHAPE, device=DEVICE)
    slots = buffer.reserve(KEPT, torch.arange(TRAJECTORIES))
    for step in range(STEPS):
        buffer.append(slots, step, x[:, step], output[:, step], x[:, step + 1])
    found = buffer.gather(buffer.transitions())
    row, step = torch.arange(TRAJECTORIES).repeat_interleave(kept), KEPT.flatten()
    o = output[row, step]
    if block:
        coded = buffer_torch.quantise(o.flatten(1), block)
        o = buffer_torch.dequantise(*coded, block, o.dtype).view_as(o)
    pairs = {"x": (found.x, x[row, step]), "x'": (found.x_next, x[row, step + 1]), "o": (found.model_output, o)}
    for name, (actual, expected) in pairs.items():
        assert torch.equal(actual, expected), f"{name} gathered is not what was appended"


CASES: dict[str, Callable[[], None]] = {
    **{name: lambda name=name: kernel(name) for name in OPERATIONS},
    "group_norm_silu": normalisation,
    "append, gather": lambda: stored("device"),
    "append, gather, pinned": lambda: stored("pinned"),
    "append, gather, 8 bits": lambda: stored("device", block=64),
}


def main() -> None:
    failed = []
    for name, case in CASES.items():
        try:
            case()
            if CUDA:
                torch.cuda.synchronize()
        except Exception as error:  # go on with the other cases
            traceback.print_exc()
            failed.append(name)
            rows.add("tests", f"smoke: {name}", note=f"{type(error).__name__}: {error}".splitlines()[0][:160])
    rows.add("tests", "smoke", passed=len(CASES) - len(failed), failed=len(failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
