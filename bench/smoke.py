"""Calls each operation of the kernels and the buffer once on the device: `python -m bench.smoke`.

Each result is compared with plain torch. The ten cases are always the same, and small enough for compute-sanitizer.
"""

import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from bench import rows
from bench.operations import CUDA, DEVICE, OPERATIONS, disagreement, tensors
from fastnabla.objective.backend import select
from fastnabla.trajectories import buffer_ops, buffer_torch
from fastnabla.trajectories.buffer import TrajectoryBuffer

TRAJECTORIES, STEPS, SHAPE = 3, 5, (4, 8, 8)
KEPT = torch.tensor([[4, 0], [4, 1], [4, 3]])


def kernel(operation: str) -> None:
    operations = select("triton" if CUDA or rows.is_dry() else "auto", DEVICE)
    error = disagreement(operations, operation, tensors(SHAPE, 4))
    assert error < 1, f"differs from plain torch by {error:.2g} times the tolerance"


def stored(storage: str, whole: bool, block: int | None = None) -> None:
    """Gathered transitions equal those appended, step by step or at once; in 8 bits to within half a scale."""
    kept = KEPT.shape[1]
    buffer = TrajectoryBuffer(TRAJECTORIES, STEPS, kept, SHAPE, device=DEVICE, storage=storage, output_block=block)
    x = torch.randn(TRAJECTORIES, STEPS + 1, *SHAPE, device=DEVICE)
    output = torch.randn(TRAJECTORIES, STEPS, *SHAPE, device=DEVICE)
    slots = buffer.reserve(KEPT, torch.arange(TRAJECTORIES))
    if whole:
        buffer.append_steps(slots, x, output)
    else:
        for step in range(STEPS):
            buffer.append(slots, step, x[:, step], output[:, step], x[:, step + 1])
    found = buffer.gather(buffer.transitions())
    row, step = torch.arange(TRAJECTORIES).repeat_interleave(kept), KEPT.flatten()
    allowed = output.abs().max().item() / 254 if block else 0.0
    pairs = {"x": (found.x, x[row, step], 0.0), "x'": (found.x_next, x[row, step + 1], 0.0)}
    for name, (actual, expected, limit) in (pairs | {"o": (found.model_output, output[row, step], allowed)}).items():
        assert (actual - expected).abs().max() <= limit, f"gathered {name} differs from what was appended"


def quantised() -> None:
    x = torch.randn(4, 256, device=DEVICE)
    pairs = zip(buffer_ops.quantise(x, 64), buffer_torch.quantise(x, 64), strict=True)
    assert all(torch.equal(actual, expected) for actual, expected in pairs), "quantise differs from plain torch"


def dequantised() -> None:
    coded: tuple[Tensor, Tensor] = buffer_torch.quantise(torch.randn(4, 256, device=DEVICE), 64)
    actual, expected = (ops.dequantise(*coded, 64, torch.float32) for ops in (buffer_ops, buffer_torch))
    assert torch.equal(actual, expected), "dequantise differs from plain torch"


CASES: dict[str, Callable[[], None]] = {
    **{name: lambda name=name: kernel(name) for name in OPERATIONS},
    "append, gather": lambda: stored("device", whole=False),
    "append_steps, gather, pinned": lambda: stored("pinned", whole=True),
    "append, gather, 8 bits": lambda: stored("device", whole=False, block=64),
    "quantise": quantised,
    "dequantise": dequantised,
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
