"""Assertions and small inputs shared by several test files."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.transition import TransitionTable

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**STABLE_DIFFUSION, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}

NETWORK_DTYPE = "bfloat16" if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
"""Compute dtype for networks that are not tiny. On a CPU without bfloat16 instructions oneDNN does not support bfloat16, and
torch's own convolutions are 80 times slower."""

BACKENDS = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter, because it runs on the CPU"
        ),
    ),
]
"""Implementations of the objective that run on a CPU: plain torch, and the kernels in Triton's interpreter."""


def ddim(num_steps: int | None = None, **changes):
    """Stable Diffusion's DDIM scheduler, with its timesteps set if `num_steps` is given."""
    from diffusers import DDIMScheduler  # not at the top: the kernels' tests also run without diffusers

    scheduler = DDIMScheduler(**{**DDIM, **changes})
    if num_steps is not None:
        scheduler.set_timesteps(num_steps)
    return scheduler


def ddim_table(num_steps: int = 10, eta: float = 1.0, **changes) -> TransitionTable:
    return TransitionTable.from_scheduler(ddim(**changes), num_steps, eta)


def flow_table(steps: int = 10, eta: float = 1.0, shift: float = 3.0, **settings: Any) -> TransitionTable:
    """A table of flow matching with SD3's shift, and `settings` of `from_scheduler`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return TransitionTable.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), steps, eta, **settings)


def matched_flow_table(table: TransitionTable, eta: float) -> TransitionTable:
    """DDIM rows of a flow with the signal-to-noise ratios of a variance-preserving table, in float64: its states are those of
    `table` times 1/(√ᾱ + √(1 − ᾱ))."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    signal = torch.cat([table.alpha_bar, table.alpha_bar_next[-1:]]).sqrt()
    noise = torch.cat([table.noise_std, table.noise_std_next[-1:]])
    levels = noise / (signal + noise)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=levels[:-1].tolist())
    scheduler.sigmas = torch.cat([levels[:-1], levels.new_zeros(1)])  # not rounded to float32
    return TransitionTable.from_scheduler(scheduler, eta=eta, end=levels[-1].item())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of `expected`."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each tensor's error is at most 1e-4 of its norm, plus 1e-7 of the largest norm of all tensors.

    The relative part allows for float32 rounding through two networks. The absolute part is for biases before a group
    normalisation with one channel a group, whose true gradient is 0: their computed gradients are rounding noise.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-7 * max(tensor.norm() for tensor in expected.values())
    errors = {
        name: ((actual[name] - tensor).norm() / (1e-4 * tensor.norm() + floor)).item()
        for name, tensor in expected.items()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1, f"{worst}: {errors[worst]:.3g} times the tolerance"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def append_all(buffer: TrajectoryBuffer, slots: Tensor, states: Tensor, outputs: Tensor) -> None:
    """Record whole trajectories: `states [B, T + 1, …]`, `outputs [B, T, …]`."""
    for step in range(buffer.num_steps):
        buffer.append(slots, step, states[:, step], outputs[:, step], states[:, step + 1])


@contextlib.contextmanager
def compiler_settings() -> Iterator[None]:
    """At its end, what `fastnabla.models.compiling.allow_compiling` sets is put back."""
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    names += ("skip_tensor_guards_with_matching_dict_tags",)
    dynamo, functorch = torch._dynamo.config, torch._functorch.config
    before = {name: getattr(dynamo, name) for name in names}
    with dynamo.patch(before), functorch.patch(donated_buffer=functorch.donated_buffer):
        yield


@contextlib.contextmanager
def compiling_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A context with nothing compiled before it or left after it. On a CPU, torch.compile stops before it generates code."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    with compiler_settings():
        yield
    torch._dynamo.reset()
