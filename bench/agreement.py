"""Whether variants of the training step compute the same gradients: toy ones the published algorithm's, large ones each other's.

In float64 the toy gradients agree to `FLOAT64_LIMIT`, so they are the same sums. In float32 each is off by 3e-4 to 4e-4 of a
LoRA tensor on a CPU (measured against float64), and by some 3e-3 where convolutions are off by 1e-6, as on a GPU: the
residual (b/σ²)(o_θ − o_ref) magnifies the rounding of two outputs that are nearly equal. The kernels compute in float32, so
theirs get `KERNELS_LIMIT`.

In bfloat16 a step's gradients are rounded so far that they tell little: 0.7 of the whole gradient between two correct
computations of the toy networks. A single pass of the network is not magnified: what compiling changes is judged by that, and
by how far equal computations are apart, which is measured beside it.
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
    """The largest relative difference of a gradient tensor; of one whose norm is below 1e-5 of the largest tensor's, in
    units of that, since biases before a normalisation have gradients of rounding alone."""
    scale = max(gradient.norm() for gradient in expected)
    pairs = zip(actual, expected, strict=True)
    found = [((a - b).norm() / (b.norm() + 1e-5 * scale)).item() for a, b in pairs]
    return max(found, key=lambda value: (value != value, value))  # NaN, if there is one


def toy_gradients(variant: Variant, device: torch.device, dtype: torch.dtype, model: Model = TOY) -> Gradients:
    """Of LoRA and g_φ, over 12 transitions that depend on `variant.draw` alone; on the CPU, in float64."""
    workload = Workload(model, model.pixels, device, dtype)
    run, _, policy = workload.step(variant, 12, 4)
    run()
    return taken([*policy.trainable(), *workload.flow.parameters()])


def taken(parameters: list[nn.Parameter]) -> Gradients:
    """The parameters' gradients, on the CPU in float64."""
    return [parameter.grad.double().cpu() for parameter in parameters]


@functools.cache
def published_gradients(draw: str, device: torch.device, dtype: torch.dtype) -> Gradients:
    """The published algorithm's `toy_gradients`."""
    return toy_gradients(Variant(name="published", ours=False, draw=draw), device, dtype)


def check(variant: Variant, device: torch.device) -> dict[str, Any]:
    """For a row of the table: the "gradient difference" of `variant` on toy networks from the published algorithm, and a
    "note" if it is above the limit. Nothing for variants that change the gradients, or are the algorithm itself."""
    changes = variant.reward_gradient != "lookahead" or variant.attention != "sdpa" or variant.reward != "small"
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
"""A network pass: its "output", and that output's gradients, for fixed cotangents, to the "input" and the "LoRA"."""


def network_pass(workload: Workload, variant: Variant, batch: Transitions, size: int) -> Pass:
    """The policy's pass over `batch`, `size` transitions at a time, differentiated as a step does: to the input, then to the
    weights."""
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
    """For a row: whether a compiled step's gradients "agree" with the eager one's.

    Args:
        step, expected: gradients of the two steps. None may be 0 that is not expected to be, or not finite.
        actual, eager: a pass of the two networks.
        halves: the eager pass in two halves: the same but for rounding. `actual` may be three times as far from `eager`,
            and 1e-2 for what compiled kernels round otherwise.
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
    """Norm of the difference of two whole gradients, over that of `expected`."""
    apart = sum((a - b).square().sum() for a, b in zip(actual, expected, strict=True))
    return (apart / sum(b.square().sum() for b in expected)).sqrt().item()
