"""The objective's operations with realistic inputs, for benchmarks and smoke tests."""

import functools
from typing import Any

import torch
from torch import Tensor

from bench.measure import Run
from bench.published import ddim_table
from fastnabla.objective.balance import ForwardBalance
from fastnabla.objective.ops import PLAIN, ObjectiveOps
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionRows

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
GUIDANCE_SCALE = 5.0
SETTINGS = {"objective": Objective(beta=100.0, trust_region_weight=1.0), "guidance_scale": GUIDANCE_SCALE}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-3}
"""Tolerance by dtype: norm of a result's error relative to its norm. The published algorithm loses digits by subtracting whole
scores. A bfloat16 gradient has a rounding error of up to 4e-3 in each element."""
WITH_BACKWARD = ("forward_balance", "reverse_balance", "reference_balance", "gaussian_log_prob")
OPERATIONS = (*WITH_BACKWARD, "reverse_cotangent", "reference_cotangent", "guided_step")


def whole(operation: str) -> str:
    """The direction that includes all of an operation."""
    return "both" if operation in WITH_BACKWARD else "forward"


def bytes_moved(operation: str, shape: tuple[int, ...], batch: int, direction: str, itemsize: int = 2) -> int:
    """Bytes that an operation must read and write: each tensor once, including those saved for the backward pass.

    The counts are those of the kernels' docstrings. Outputs, flow and their gradients have `itemsize` bytes an element; states
    and scores are float32. Partial sums and tensors with few entries a row are neglected.
    """
    one, pair, state = itemsize, 2 * itemsize, 4
    reads_and_writes = {
        # two pairs, x, x', ∇r, o_old, g; the gradients of o and g
        "forward_balance": ((2 * pair + 4 * state + one) + 2 * state, 2 * state + (pair + one)),
        # two pairs, two products, ∂r/∂x̂0, g; the gradient of g
        "reverse_balance": ((2 * pair + 3 * state + one) + state, state + one),
        # product, ∇r(x'), ∂r/∂x̂0, g, g'; the gradient of g
        "reference_balance": ((3 * state + 2 * one) + state, state + one),
        # pair, x, x'; e. Only the pair's gradient
        "gaussian_log_prob": ((pair + 2 * state) + state, state + pair),
        # pair, x, x', ∂r/∂x̂0; pair
        "reverse_cotangent": ((pair + 3 * state) + pair, 0),
        # ∇r(x'), g', ∂r/∂x̂0; pair
        "reference_cotangent": ((2 * state + one) + pair, 0),
        # pair, x, ε; x', o
        "guided_step": ((pair + 2 * state) + 2 * state, 0),
    }
    forward, backward = reads_and_writes[operation]
    by_element = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    return by_element * batch * torch.Size(shape).numel()


@functools.lru_cache(maxsize=1)
def tensors(shape: tuple[int, ...], batch: int) -> dict[str, Any]:
    """Transitions as sampled by a policy near the reference, at steps across the whole table, the last included."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(copies: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(copies * batch, *shape, device=DEVICE, generator=generator).to(dtype)

    table, x = ddim_table().to(DEVICE), normal()
    steps = torch.linspace(0, len(table) - 1, batch, device=DEVICE).round().long()
    rows = TransitionRows(table, steps, x)
    for name in ("a", "b", "sigma", "c", "d", "alpha_bar", "alpha_bar_next", "last"):
        getattr(rows, name)  # gathered here, so that no provider is timed with it
    output_ref = normal(2, DTYPE)
    output = (output_ref + 0.1 * normal(2)).to(DTYPE)
    x_next, output_old = PLAIN.guided_step(output, x, normal(), rows, guidance_scale=GUIDANCE_SCALE)
    return {
        "output": output.requires_grad_(),
        "output_ref": output_ref,
        "x": x,
        "x_next": x_next,
        "rows": rows,
        "flow": (0.1 * normal(dtype=DTYPE)).requires_grad_(),
        "output_old": output_old + 0.01 * normal(),
        "noise": normal(),
        "reward": normal(),
        "products": (normal(), normal()),
    }


def call(operations: ObjectiveOps, operation: str, t: dict[str, Any]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The results of an operation, and the tensors with respect to which the first result is differentiated."""
    run, states = getattr(operations, operation), (t["x"], t["x_next"], t["rows"])
    if operation == "guided_step":
        return run(t["output"].detach(), t["x"], t["noise"], t["rows"], guidance_scale=GUIDANCE_SCALE), []
    if operation == "gaussian_log_prob":
        return (run(t["output"], *states, guidance_scale=GUIDANCE_SCALE),), [t["output"]]
    if operation == "reverse_cotangent":
        return (run(t["output"].detach(), *states, t["reward"], **SETTINGS),), []
    if operation == "reverse_balance":
        outputs = (t["output"].detach(), t["output_ref"])
        loss = run(*t["products"], t["rows"], t["flow"], None, t["reward"], outputs, **SETTINGS)
        return (loss,), [t["flow"]]
    if operation == "reference_cotangent":
        scores = (t["reward"], t["flow"].detach(), t["reward"])
        return (run(t["output_ref"], t["rows"], *scores, **SETTINGS),), []
    if operation == "reference_balance":
        scores = (t["reward"], t["flow"].detach(), None, t["reward"])
        loss = run(t["products"][0], t["rows"], t["flow"], *scores, objective=SETTINGS["objective"])
        return (loss,), [t["flow"]]
    results = run(t["output"], t["output_ref"], *states, t["reward"], t["flow"], t["output_old"], **SETTINGS)
    return tuple(getattr(results, name) for name in ForwardBalance.__dataclass_fields__), [t["output"], t["flow"]]


def runner(operations: ObjectiveOps, operation: str, t: dict[str, Any], direction: str) -> Run:
    """The callable that is timed; it takes no arguments."""
    if direction == "forward":
        return lambda: call(operations, operation, t)
    upstream = torch.ones(len(t["x"]), device=DEVICE)
    if direction == "both":

        def both() -> tuple[Tensor, ...]:
            (loss, *_), inputs = call(operations, operation, t)
            return torch.autograd.grad(loss, inputs, upstream)

        return both
    (loss, *_), inputs = call(operations, operation, t)
    return lambda: torch.autograd.grad(loss, inputs, upstream, retain_graph=True)


def disagreement(operations: ObjectiveOps, operation: str, t: dict[str, Any], reference: ObjectiveOps = PLAIN) -> float:
    """The largest error of a value or gradient relative to the reference, in units of its tolerance."""

    def results(operations: ObjectiveOps) -> list[Tensor]:
        values, inputs = call(operations, operation, t)
        upstream = torch.linspace(0.5, 1.5, len(t["x"]), device=DEVICE)
        return [*values, *(torch.autograd.grad(values[0], inputs, upstream) if inputs else ())]

    pairs = list(zip(results(operations), results(reference), strict=True))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    errors = [((a.double() - b.double()).norm() / b.double().norm() / TOLERANCE[b.dtype]).item() for a, b in pairs]
    return max(errors, key=lambda error: (error != error, error))  # NaN, if there is one
