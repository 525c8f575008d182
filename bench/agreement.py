"""Whether variants of the training step compute the same gradients: toy ones the published algorithm's, large ones each other's.

In float64 the toy gradients agree to `FLOAT64_LIMIT`, so they are the same sums. In float32 each is off by 3e-4 to 4e-4 of a
LoRA tensor on a CPU (measured against float64), and by some 3e-3 where convolutions are off by 1e-6, as on a GPU: the
residual (b/σ²)(o_θ − o_ref) magnifies the rounding of two outputs that are nearly equal. The kernels compute in float32, so
theirs get `KERNELS_LIMIT`.

In bfloat16, at full size, the gradients are rounded far more; how far apart equal computations are is measured beside them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bench.models import TOY, Model
from bench.variants import Variant
from bench.workload import Workload

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


def check(variant: Variant, device: torch.device) -> dict[str, Any]:
    """For a row of the table: the "gradient difference" of `variant` on toy networks from the published algorithm, and a
    "note" if it is above the limit. Nothing for variants that change the gradients, or are the algorithm itself."""
    changes = variant.guidance != "lookahead" or variant.attention != "sdpa" or variant.reward != "small"
    if changes or variant.compile != "none" or not variant.ours:
        return {}
    dtype, limit = (torch.float32, KERNELS_LIMIT) if variant.kernels else (torch.float64, FLOAT64_LIMIT)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        expected = toy_gradients(Variant(name="published", ours=False, draw=variant.draw), device, dtype)
        found = difference(toy_gradients(variant, device, dtype), expected)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    wrong = not found < limit
    return {"gradient difference": found} | ({"note": f"GRADIENTS DIFFER, by more than {limit:.0e}"} if wrong else {})


def verdict(actual: Gradients, expected: Gradients, floor: float) -> dict[str, Any]:
    """For a row: how a gradient at full size compares with another computation's, and whether the two "agree".

    Args:
        actual, expected: the two, tensor by tensor.
        floor: relative difference of two that are known to be equal but for rounding.
    """
    zero = sum(1 for a, b in zip(actual, expected, strict=True) if not a.any() and b.any())
    found = distance(actual, expected)
    numbers = {"difference": found, "floor": floor, "zero tensors": zero}
    if zero:
        return numbers | {"gradients": f"WRONG: {zero} of {len(actual)} tensors are 0"}
    if not found < max(1e-2, 3 * floor):
        return numbers | {"gradients": "WRONG: further from eager than three times the rounding floor"}
    return numbers | {"gradients": "agree"}


def distance(actual: Gradients, expected: Gradients) -> float:
    """Norm of the difference of two whole gradients, over that of `expected`."""
    apart = sum((a - b).square().sum() for a, b in zip(actual, expected, strict=True))
    return (apart / sum(b.square().sum() for b in expected)).sqrt().item()
