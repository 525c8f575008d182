"""The sampler functions of the reference implementation of arXiv 2412.07775, with the same signatures.

They return what the reference returns, computed through `TransitionTable`. The differences are deliberate:

- Schedulers and settings whose steps are not Gaussian and affine in the network's output (clipping, thresholding, η = 0, …)
  raise. So do timesteps that are not in the schedule of `set_timesteps`, and arguments that would have no effect.
- SDE-DPM-Solver++ uses `prev_sample` and takes each row's step from its timestep. The reference draws a new sample instead,
  and takes the step from `step_index`.
- DDPM and multistep DPM-Solver schedulers are supported too.
- Coefficients are computed in float64, and arithmetic on half-precision states in float32. (The reference's σ² of the last
  step is off by 1e-5.)

On CUDA the draw and the score with respect to x are Triton kernels, unless the draw needs a gradient or the score a
second derivative.

These functions help to port code. `fastnabla.losses` computes differences of scores to more digits.
"""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastnabla.flow_matching_coefficients import FLOW_SCHEDULERS
from fastnabla.objective.backend import select
from fastnabla.objective.gaussian import full, step_score
from fastnabla.objective.ops import PLAIN
from fastnabla.transition import TransitionRows, TransitionTable


def inference_step(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor | int,
    sample: Tensor,
    eta: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    prev_sample: Tensor | None = None,
    prev_timestep: Tensor | int | None = None,
    reverse_grad: bool = False,
    retain_graph: bool = False,
    allow_2nd: bool = False,
    strength: float = 1.0,
    step_index: Tensor | int = 0,
) -> tuple[Tensor, Tensor]:
    """One sampling step x → x', drawn or given, and its score.

    Args:
        scheduler: diffusers scheduler after `set_timesteps`.
        model_output: guided output of the network at x, `[N, …]`.
        timestep: timestep of x; `[N]` int64, or one for all rows.
        sample: x, `[N, …]`.
        eta: η > 0 of DDIM steps; 1 for other schedulers.
        generator: generator of the noise of x'; not with `prev_sample`.
        prev_sample: x' `[N, …]`; drawn if None.
        prev_timestep: timestep of x'. Optional, because it follows from the schedule.
        reverse_grad: return the score with respect to x instead of x'; `sample` must require a gradient, and `model_output` be
            computed from it.
        retain_graph: with `reverse_grad`, keep the graph of `model_output`.
        allow_2nd: with `reverse_grad`, return a differentiable score; this keeps the graph as well.
        strength: λ, the factor of the score.
        step_index: number of the step. Redundant, because it follows from the timestep. As in the reference, DDIM and DDPM
            ignore it; for DPM-Solver a value other than the default must agree with `timestep`.

    Returns:
        x' in the dtype of `sample`, and the score `[N, …]` float32 (float64 if `sample` is):
        ``λ ∇_{x'} log P(x'|x)``, with gradients to `model_output` and `sample`, or ``λ ∇_x log P(x'|x)``.
        x' itself is held constant in both.

    Raises:
        ValueError: an unsupported scheduler or setting, a timestep that is not in the schedule, contradictory
            arguments, or arguments without effect.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("generator and prev_sample are both given: pass one, a given x' needs no noise")
    if (retain_graph or allow_2nd) and not reverse_grad:
        raise ValueError("retain_graph and allow_2nd have no effect without reverse_grad=True")
    if reverse_grad and not sample.requires_grad:
        raise ValueError("reverse_grad=True: sample must require a gradient, and model_output be computed from it")
    if reverse_grad and not model_output.requires_grad:
        raise ValueError("reverse_grad=True: model_output has no graph: compute it from sample, with gradients enabled")
    table = _table(scheduler, eta)
    step = table.step_index(_by_row("timestep", timestep, sample))
    rows = table.rows(step, sample)
    if prev_timestep is not None:
        given = _by_row("prev_timestep", prev_timestep, sample).clamp(min=0)
        expected = rows.timestep_next.long()
        if not torch.equal(given, expected):
            raise ValueError(
                f"prev_timestep = {given.tolist()}: expected {expected.tolist()}, the schedule's next timesteps"
            )
    if type(scheduler).__name__.startswith("DPMSolver") and (isinstance(step_index, Tensor) or step_index != 0):
        given = _by_row("step_index", step_index, sample)
        if not torch.equal(given, step):
            raise ValueError(f"step_index = {given.tolist()}: expected {step.tolist()}, the steps of timestep")

    ops = select("auto", sample.device, sample.dtype)
    if prev_sample is None:
        like = model_output
        noise = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        tracked = torch.is_grad_enabled() and (model_output.requires_grad or sample.requires_grad)
        step = PLAIN.guided_step if tracked else ops.guided_step  # the kernel's x' has no gradient
        prev_sample, _ = step(model_output, sample, noise, rows, guidance_scale=None)
    fixed = full(prev_sample.detach())
    if reverse_grad:
        log_prob = PLAIN.gaussian_log_prob if allow_2nd else ops.gaussian_log_prob
        with torch.enable_grad():
            density = log_prob(model_output, sample, fixed, rows, guidance_scale=None).sum()
            (score,) = torch.autograd.grad(
                density, sample, retain_graph=retain_graph or allow_2nd, create_graph=allow_2nd
            )
            score = strength * full(score)
    else:
        score = strength * step_score(model_output, sample, fixed, rows)
    return prev_sample.to(sample.dtype), score


def predict_clean(
    scheduler: Any,
    model_output: Tensor,
    sample: Tensor,
    timestep: Tensor | int,
    no_jacobian: bool = False,
    strength: float = 1.0,
) -> Tensor:
    """One-step prediction of the clean sample, x̂0 `[N, …]`, in the dtype of `sample`.

    At timestep 0 the state is clean and x̂0 = x. With sample-prediction x̂0 is the network's output there too, as in the
    reference; everywhere else fastnabla takes x.

    Args:
        scheduler: diffusers scheduler after `set_timesteps`.
        model_output: guided output of the network at x, `[N, …]`.
        sample: x, `[N, …]`.
        timestep: timestep of x; `[N]` int64, or one for all rows: one of the schedule, or 0.
        no_jacobian: hold `model_output` constant, so that gradients reach `sample` only directly. (The reference has this
            argument and ignores it.)
        strength: factor of `model_output`; for ε-prediction only.

    Raises:
        ValueError: as `inference_step`; or `strength` with another prediction type.
    """
    rows, finished = _state_rows(scheduler, timestep, sample)
    kind = scheduler.config.prediction_type
    if strength != 1.0 and kind != "epsilon":
        raise ValueError(f"strength = {strength}: expected 1 with prediction_type={kind!r}; only 'epsilon' has it")
    output = model_output.detach() if no_jacobian else model_output
    if kind == "sample":
        return output.to(sample.dtype)
    c, d = torch.where(finished, rows.c_next, rows.c), torch.where(finished, rows.d_next, rows.d)
    return (c * full(sample) + strength * d * full(output)).to(sample.dtype)


def get_alpha_prod_t(scheduler: Any, timestep: Tensor | int, sample: Tensor) -> Tensor:
    """ᾱ at `timestep`, float32 (float64 if `sample` is), expanded to the shape of `sample`.

    Args:
        scheduler: diffusers scheduler after `set_timesteps`.
        timestep: `[N]` int64, or one for all rows: one of the schedule, or 0.
        sample: `[N, …]`; only its shape, device and dtype matter.

    Raises:
        ValueError: as `inference_step`.
    """
    rows, finished = _state_rows(scheduler, timestep, sample)
    return torch.where(finished, rows.alpha_bar_next, rows.alpha_bar).expand(sample.shape)


def _table(scheduler: Any, eta: float = 1.0) -> TransitionTable:
    if (name := type(scheduler).__name__) in FLOW_SCHEDULERS:
        raise ValueError(
            f"scheduler = {name}: the reference has no flow matching. Use fastnabla.losses, or the coefficients of "
            "TransitionTable.from_scheduler."
        )
    return TransitionTable.from_scheduler(scheduler, eta=eta)


def _state_rows(scheduler: Any, timestep: Tensor | int, sample: Tensor) -> tuple[TransitionRows, Tensor]:
    """Table rows of the steps that start at `timestep`, and where `timestep` is 0. There the row is the step that ends at 0."""
    table = _table(scheduler)
    timestep = _by_row("timestep", timestep, sample)
    finished = timestep == 0
    rows = table.rows(table.step_index(torch.where(finished, table.timestep[-1].item(), timestep)), sample)
    return rows, finished.view(rows.sigma.shape)


def _by_row(name: str, value: Tensor | int, sample: Tensor) -> Tensor:
    value = torch.as_tensor(value, device=sample.device)
    if value.is_floating_point() or value.dim() > 1 or value.numel() not in (1, len(sample)):
        raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, expected int64, ({len(sample)},) or one value")
    return value.long().flatten().expand(len(sample))
