"""What a reward does, measured: shape, gradient, independence of rows, use of prompts, time and memory."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastnabla.rewards.sum import RewardFunction

GRADIENT_TOLERANCE = 0.02
STEPS = (3e-2, 1e-2, 3e-3)
DIRECTIONS = 2
ROW_TOLERANCE = 1e-4
PROMPT_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One line of a report."""

    what: str
    result: str
    passed: bool | None
    """None: nothing to pass, or undecided."""


class SavedBytes:
    """Bytes that autograd keeps for the backward pass, each storage once, without the parameters."""

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
        """Count what is saved inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


def value_and_gradient(reward: RewardFunction, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Rewards `[B]`, and the gradient of their sum in the images; None if there is none."""
    images = images.detach().requires_grad_()
    values = reward(images, prompts)
    if not values.requires_grad:
        return values, None
    return values.detach(), torch.autograd.grad(values.sum(), images, allow_unused=True)[0]


def gradient_error(reward: RewardFunction, images: Tensor, prompts: Sequence[str]) -> tuple[float, float]:
    """Error of the gradient, and how much of it float32 rounding may be; both relative to its norm.

    Along random directions, whose components have variance 1, the derivative by the gradient is compared with central
    differences at several steps. The best step counts, and the worst direction. A gradient without a share f of its
    squared norm is off by about √f.
    """
    images = 0.8 * images + 0.1  # room for the steps
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


def deviation(
    reward: RewardFunction, exact: RewardFunction, images: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """How far `reward` is from `exact`: of the values their difference `[B]`, of the images' gradients the norm of the
    difference relative to that of `exact`'s `[B]`; both float64."""
    (values, gradient), (wanted, wanted_gradient) = (value_and_gradient(r, images, prompts) for r in (reward, exact))
    apart = (gradient - wanted_gradient).double().flatten(1).norm(dim=1)
    return values.double() - wanted.double(), apart / wanted_gradient.double().flatten(1).norm(dim=1)


def inspect_reward(
    reward: RewardFunction, images: Tensor, prompts: Sequence[str], exact: RewardFunction | None = None
) -> list[Finding]:
    """Findings, the first broken one last if it rules out the rest.

    Args:
        reward: the function.
        images: `[B, 3, H, W]` in [0, 1], B at least 2.
        prompts: B prompts, not all the same.
        exact: the same in float32 if `reward` rounds more than that: its gradient and rows are tested, and how far
            `reward` is from it is told.
    """
    rounded, reward = reward, exact or reward
    findings = [Finding("parameters", _millions(reward), None)] if isinstance(reward, nn.Module) else []

    def found(what: str, result: str, passed: bool | None) -> bool:
        findings.append(Finding(what, result, passed))
        return passed is not False

    with torch.no_grad():
        values = reward(images, prompts)
    shape = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    if not found("shape", f"{shape} for {len(images)} images", shape == f"shape ({len(images)},)"):
        return findings
    if not found("values", ", ".join(f"{v:.5g}" for v in values.tolist()), bool(torch.isfinite(values).all())):
        return findings
    _, gradient = value_and_gradient(reward, images, prompts)
    if gradient is None or not torch.isfinite(gradient).all() or not gradient.any():
        problem = "none" if gradient is None else "0 everywhere" if torch.isfinite(gradient).all() else "not finite"
        found("gradient", f"{problem}; look for no_grad, detach, round, numpy or PIL", False)
        return findings
    error, rounding = gradient_error(reward, images, prompts)
    text = f"off by {error:.1%} of its norm along random directions; at most {GRADIENT_TOLERANCE:.0%} may be"
    if rounding > GRADIENT_TOLERANCE:
        found("gradient", f"too small against the reward's rounding to tell (off by {error:.1%})", None)
    else:
        found("gradient", text, error <= GRADIENT_TOLERANCE)
    size = values.abs().max().item()
    with torch.no_grad():
        rows = torch.cat([reward(images[i : i + 1], [prompts[i]]) for i in range(len(images))])
        turned = reward(images, [*prompts[1:], prompts[0]])
    apart = (rows - values).abs().max().item() / max(size, 1e-12)
    found("rows", f"alone or in a batch, they differ by {apart:.1e} of the value", apart <= ROW_TOLERANCE)
    change = (turned - values).abs().max().item()
    found("prompts", "used" if change > PROMPT_TOLERANCE * size else "ignored", None)
    if exact is not None:
        values_off, gradient_off = deviation(rounded, exact, images, prompts)
        off = f"values by up to {values_off.abs().max():.2g}, gradients by up to {gradient_off.max():.1%} of their norm"
        found("precision", f"off from float32: {off}", None)
    seconds, memory = cost(lambda: value_and_gradient(rounded, images, prompts), rounded, images.device)
    found("time", f"{1e3 * seconds / len(images):.1f} ms an image, forward and backward", None)
    found("memory", memory, None)
    return findings


def cost(call: Callable[[], object], reward: RewardFunction, device: torch.device) -> tuple[float, str]:
    """Median seconds of three calls after a first, and in words what memory a call takes."""
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
        return statistics.median(seconds[1:]), f"{used / 2**20:.1f} MiB at the peak, besides the weights"
    saved = SavedBytes(list(reward.parameters()) if isinstance(reward, nn.Module) else ())
    with saved.counting():
        call()
    return statistics.median(seconds[1:]), f"{saved.total / 2**20:.1f} MiB kept for the backward pass"


def _millions(network: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} million"
