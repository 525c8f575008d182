"""Tests and measurements of a reward: shape, gradient, independence of rows, use of prompts, time and memory."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastnabla.rewards.in_float32 import InFloat32
from fastnabla.rewards.score import RewardFunction

GRADIENT_TOLERANCE = 0.02
STEPS = (3e-2, 1e-2, 3e-3)
DIRECTIONS = 2
ROW_TOLERANCE = 1e-4
PROMPT_TOLERANCE = 1e-6
FLOAT32 = "use reward.precision float32, or compute in float32 in a reward of your own"


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One row of the report."""

    what: str
    result: str
    passed: bool | None
    """None for a measurement, or if the test is inconclusive."""


class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass: each storage once, parameters excluded."""

    def __init__(self, parameters: Sequence[Tensor] = ()) -> None:
        self.ignored = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.storages: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self.storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.ignored:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the tensors saved inside the context."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


def value_and_gradient(reward: RewardFunction, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Rewards `[B]` and the gradient of their sum with respect to the images. None if there is no gradient."""
    images = images.detach().requires_grad_()
    values = reward(images, prompts)
    if not values.requires_grad:
        return values, None
    return values.detach(), torch.autograd.grad(values.sum(), images, allow_unused=True)[0]


def gradient_error(reward: RewardFunction, images: Tensor, prompts: Sequence[str]) -> tuple[float, float]:
    """Error of the gradient, and the part that float32 rounding may explain, both relative to the gradient's norm.

    The directional derivative is compared with central differences along random directions of unit variance. For each
    direction the best of several step sizes is taken; the result is that of the worst direction. A gradient that lacks a
    fraction f of its squared norm has an error of about √f.
    """
    images = 0.8 * images + 0.1  # leaves room for the steps within [0, 1]
    values, gradient = value_and_gradient(reward, images, prompts)
    norm = gradient.double().norm().item()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(DIRECTIONS):
        direction = torch.randn(images.shape, generator=generator).to(images)
        slope = (gradient.double() * direction.double()).sum().item()
        errors = []
        for step in STEPS:
            with torch.no_grad():
                above, below = (reward(images + sign * step * direction, prompts).double() for sign in (1, -1))
            errors.append(abs((above - below).sum().item() / (2 * step) - slope) / norm)
        worst = max(worst, min(errors))
    rounding = 4 * torch.finfo(torch.float32).eps * values.abs().sum().item() / (2 * max(STEPS) * norm)
    return worst, rounding


@torch.no_grad()
def row_difference(reward: RewardFunction, images: Tensor, prompts: Sequence[str]) -> float:
    """Largest difference between the rewards of images alone and in a batch, relative to the largest reward."""
    values = reward(images, prompts)
    rows = torch.cat([reward(images[i : i + 1], [prompts[i]]) for i in range(len(images))])
    return (rows - values).abs().max().item() / max(values.abs().max().item(), 1e-12)


def _rounding_is_why(error: Callable[[], float], tolerance: float, style: str) -> str:
    """The end of a failed test's result if the reward passes in float32. "" if it fails there too, computes in float32 anyway,
    or has operations that do not run in float32.

    Args:
        error: measures the reward again.
        tolerance: largest error that passes.
        style: format of the error.
    """
    try:
        with InFloat32() as mode:
            exact = error()
    except (RuntimeError, TypeError):
        return ""
    if exact > tolerance or not mode.replaced:
        return ""
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in mode.replaced))
    return f". In float32 it is {exact:{style}}, so {names} is why; {FLOAT32}"


def deviation(
    reward: RewardFunction, exact: RewardFunction, images: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Deviation of `reward` from `exact`, float64: the difference of the values `[B]`, and the norm of the difference of
    each image's gradients, relative to the norm of the exact one, `[B]`."""
    (values, gradient), (expected, expected_gradient) = (
        value_and_gradient(r, images, prompts) for r in (reward, exact)
    )
    difference = (gradient - expected_gradient).double().flatten(1).norm(dim=1)
    return values.double() - expected.double(), difference / expected_gradient.double().flatten(1).norm(dim=1)


def inspect_reward(
    reward: RewardFunction, images: Tensor, prompts: Sequence[str], exact: RewardFunction | None = None
) -> list[Finding]:
    """Test a reward and measure its cost. If a failure rules out the remaining tests, it is the last finding.

    Args:
        reward: the reward.
        images: `[B, 3, H, W]` in [0, 1], B at least 2.
        prompts: B prompts, not all the same.
        exact: the same reward in float32, if `reward` computes in lower precision. Gradient and rows are tested on it, and
            the deviation of `reward` from it is reported.
    """
    rounded, reward = reward, exact or reward
    findings = [Finding("parameters", _millions(reward), None)] if isinstance(reward, nn.Module) else []

    def found(what: str, result: str, passed: bool | None) -> bool:
        findings.append(Finding(what, result, passed))
        return passed is not False

    # Shape and values.
    with torch.no_grad():
        values = reward(images, prompts)
    shape = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    if not found("shape", f"{shape} for {len(images)} images", shape == f"shape ({len(images)},)"):
        return findings
    if not found("values", ", ".join(f"{v:.5g}" for v in values.tolist()), bool(torch.isfinite(values).all())):
        return findings

    # Gradient.
    _, gradient = value_and_gradient(reward, images, prompts)
    if gradient is None or not torch.isfinite(gradient).all() or not gradient.any():
        problem = "none" if gradient is None else "0 everywhere" if torch.isfinite(gradient).all() else "not finite"
        found("gradient", f"{problem}; look for no_grad, detach, round, numpy or PIL", False)
        return findings
    error, rounding = gradient_error(reward, images, prompts)
    if rounding > GRADIENT_TOLERANCE:
        found("gradient", f"inconclusive: too small relative to the reward's rounding (error {error:.1%})", None)
    else:
        text = f"error along random directions: {error:.1%} of its norm (limit {GRADIENT_TOLERANCE:.0%})"
        if error > GRADIENT_TOLERANCE:
            text += _rounding_is_why(lambda: gradient_error(reward, images, prompts)[0], GRADIENT_TOLERANCE, ".1%")
        found("gradient", text, error <= GRADIENT_TOLERANCE)

    # Dependence on the rest of the batch and on prompts.
    size = values.abs().max().item()
    difference = row_difference(reward, images, prompts)
    text = f"alone and in a batch they differ by {difference:.1e} of the value"
    if difference > ROW_TOLERANCE:
        text += _rounding_is_why(lambda: row_difference(reward, images, prompts), ROW_TOLERANCE, ".1e")
    found("rows", text, difference <= ROW_TOLERANCE)
    with torch.no_grad():
        swapped = reward(images, [*prompts[1:], prompts[0]])
    change = (swapped - values).abs().max().item()
    found("prompts", "used" if change > PROMPT_TOLERANCE * size else "ignored", None)

    # Precision and cost.
    if exact is not None:
        values_error, gradients_error = deviation(rounded, exact, images, prompts)
        text = f"values up to {values_error.abs().max():.2g}, gradients up to {gradients_error.max():.1%} of their norm"
        if gradients_error.max() > GRADIENT_TOLERANCE:
            text += f". {'bfloat16' if getattr(rounded, 'precision', None) == 'bf16' else 'TF32'} is why; {FLOAT32}"
        found("precision", f"deviation from float32: {text}", None)
    seconds, memory = cost(lambda: value_and_gradient(rounded, images, prompts), rounded, images.device)
    found("time", f"{1e3 * seconds / len(images):.1f} ms per image, forward and backward", None)
    found("memory", memory, None)
    return findings


def cost(call: Callable[[], object], reward: RewardFunction, device: torch.device) -> tuple[float, str]:
    """Median seconds of three calls after a warm-up, and a description of the memory that a call needs."""
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        used = torch.cuda.max_memory_allocated(device) - before
        return statistics.median(seconds[1:]), f"{used / 2**20:.1f} MiB peak, besides the weights"
    saved = SavedBytes(list(reward.parameters()) if isinstance(reward, nn.Module) else ())
    with saved.counting():
        call()
    return statistics.median(seconds[1:]), f"{saved.total / 2**20:.1f} MiB kept for the backward pass"


def _millions(network: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} million"
