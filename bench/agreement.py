"""Checks that variants of the training step compute the same gradients: toy networks against the published algorithm, large
ones against each other.

In float64 the toy gradients agree to `FLOAT64_LIMIT`, so they are the same sums. In float32 the error of a LoRA tensor is 3e-4
to 4e-4 on a CPU (measured against float64), and about 3e-3 if convolutions have errors of 1e-6, as on a GPU: the residual
(b/σ²)(o_θ − o_ref) amplifies the rounding errors of two nearly equal outputs. The kernels compute in float32, so their limit
is `KERNELS_LIMIT`.

In bfloat16, a step's gradients say little: those of two correct computations of the toy networks differ by 0.7 of the whole
gradient. A single network pass does not amplify rounding errors. So compiled networks are compared by a single pass, and the
tolerance comes from the difference between two equivalent eager passes.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import TOY, Model
from bench.variants import Variant
from bench.workload import Workload
from fastnabla.trajectories.transitions import Transitions

FLOAT64_LIMIT = 1e-10
KERNELS_LIMIT = 1e-2
Gradients = list[Tensor]


def difference(actual: Gradients, expected: Gradients) -> float:
    """The largest relative difference of a gradient tensor.

    The denominator is floored at 1e-5 of the largest tensor's norm, because the gradients of biases before a normalisation are
    pure rounding error.
    """
    scale = max(gradient.norm() for gradient in expected)
    pairs = zip(actual, expected, strict=True)
    found = [((a - b).norm() / (b.norm() + 1e-5 * scale)).item() for a, b in pairs]
    return max(found, key=lambda value: (value != value, value))  # NaN, if there is one


def toy_gradients(variant: Variant, device: torch.device, dtype: torch.dtype, model: Model = TOY) -> Gradients:
    """Gradients of the LoRA and g_φ, on the CPU in float64, over 12 transitions that depend only on `variant.draw`."""
    workload = Workload(model, model.pixels, device, dtype)
    run, _, policy = workload.step(variant, 12, 4)
    run()
    return copied_gradients([*policy.trainable(), *workload.flow.parameters()])


def copied_gradients(parameters: list[nn.Parameter]) -> Gradients:
    """The parameters' gradients, on the CPU in float64."""
    return [parameter.grad.double().cpu() for parameter in parameters]


@functools.cache
def published_gradients(draw: str, device: torch.device, dtype: torch.dtype) -> Gradients:
    """`toy_gradients` of the published algorithm."""
    return toy_gradients(Variant(name="published", ours=False, draw=draw), device, dtype)


def check(variant: Variant, device: torch.device) -> dict[str, Any]:
    """Cells for a row of the table: the "gradient difference" between `variant` and the published algorithm on toy networks,
    and a "note" if it exceeds the limit. Empty for the algorithm itself and for variants with other gradients."""
    changes = variant.reward_gradient != "lookahead" or variant.attention != "sdpa" or variant.reward != "small"
    changes |= variant.reverse_fraction < 1  # the same in expectation
    changes |= variant.quantise != "none"
    if changes or variant.compile != "none" or not variant.ours:
        return {}
    dtype, limit = (torch.float32, KERNELS_LIMIT) if variant.kernels else (torch.float64, FLOAT64_LIMIT)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        found = difference(toy_gradients(variant, device, dtype), published_gradients(variant.draw, device, dtype))
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    wrong = not found < limit
    return {"gradient difference": found} | ({"note": f"GRADIENTS DIFFER, by more than {limit:.0e}"} if wrong else {})


Pass = dict[str, Gradients]
"""A network pass: its "output", and vector-Jacobian products for fixed cotangents to the "input" and the "LoRA"."""


def network_pass(workload: Workload, variant: Variant, batch: Transitions, size: int) -> Pass:
    """The policy's pass over `batch`, `size` transitions at a time, with backward passes as in a step: to the input, then to
    the weights."""
    policy = workload.policy(variant)
    source = torch.Generator(workload.device).manual_seed(2)
    cotangent = torch.randn(2, *batch.x.shape, generator=source, device=workload.device)
    outputs, to_input, to_weights = [], [], []
    for rows in torch.arange(len(batch)).split(size):
        x = batch.x[rows].detach().requires_grad_()
        timestep = workload.table.rows(batch.step_index[rows], x).timestep
        output = policy(x, timestep, batch.prompt[rows])
        part = cotangent[:, rows].flatten(0, 1).to(output.dtype)
        to_input += torch.autograd.grad(output, x, part, retain_graph=True)
        to_weights.append(torch.autograd.grad(output, policy.weights(), part))
        outputs.append(output.detach().unflatten(0, (2, -1)))
    summed = [sum(part.double() for part in parts).cpu() for parts in zip(*to_weights, strict=True)]
    whole = {"output": [torch.cat(outputs, 1)], "input": [torch.cat(to_input)]}
    return {name: [tensor.double().cpu() for tensor in tensors] for name, tensors in whole.items()} | {"LoRA": summed}


def verdict(step: Gradients, expected: Gradients, actual: Pass, eager: Pass, halves: Pass) -> dict[str, Any]:
    """Cells for a row: whether a compiled step's gradients "agree" with the eager step's.

    Args:
        step, expected: gradients of the compiled and the eager step. They must be finite, and zero only where expected.
        actual, eager: a pass of the compiled and the eager network.
        halves: the eager pass in two halves, which differs from `eager` only by rounding. `actual` may differ three times as
            much, plus 1e-2 for the different rounding of compiled kernels.
    """
    zero = sum(1 for a, b in zip(step, expected, strict=True) if not a.any() and b.any())
    finite = all(gradient.isfinite().all() for gradient in step)
    found = {name: distance(actual[name], eager[name]) for name in eager}
    floor = {name: distance(halves[name], eager[name]) for name in eager}
    far = [name for name, value in found.items() if not value < 1e-2 + 3 * floor[name]]
    numbers = {"zero tensors": zero, **{f"{name} off by": value for name, value in found.items()}}
    numbers |= {f"{name} floor": value for name, value in floor.items()}
    if zero:
        return numbers | {"gradients": f"WRONG: {zero} of {len(step)} tensors are 0"}
    if far or not finite:
        return numbers | {"gradients": f"WRONG: {', '.join(far) or 'not finite'}"}
    return numbers | {"gradients": "agree"}


def distance(actual: Gradients, expected: Gradients) -> float:
    """Norm of the difference of two whole gradients, relative to that of `expected`."""
    apart = sum((a - b).square().sum() for a, b in zip(actual, expected, strict=True))
    return (apart / sum(b.square().sum() for b in expected)).sqrt().item()
