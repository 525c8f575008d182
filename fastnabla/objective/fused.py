"""The operations of `gaussian.py`, `balance.py` and `reference_target.py`, with the same signatures, computed by Triton kernels.

Tensors are float32, bfloat16 or float16 in any mixture, contiguous or channels-last. The arithmetic is float32. The
kernels take the table and the step indices of `rows`, so coefficients are never broadcast over the states.
"""

from torch import Tensor

from fastnabla.kernels import forward_balance as forward_kernel
from fastnabla.kernels import gaussian_log_prob as log_prob_kernel
from fastnabla.kernels import guided_step as step_kernel
from fastnabla.kernels import reference_balance as reference_kernel
from fastnabla.kernels import reference_cotangent as reference_cotangent_kernel
from fastnabla.kernels import reverse_balance as reverse_kernel
from fastnabla.kernels import reverse_cotangent as cotangent_kernel
from fastnabla.objective.balance import ForwardBalance
from fastnabla.objective.ops import ObjectiveOps
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionRows


def _steps(rows: TransitionRows, x: Tensor) -> tuple[Tensor, Tensor]:
    return rows.table.packed(x.device), rows.step_index


def _scalars(objective: Objective, guidance_scale: float | None) -> dict[str, float | str | None]:
    """Arguments that the kernels of both residuals have."""
    return {
        "guidance_scale": guidance_scale,
        "beta": objective.beta,
        "gamma": objective.gamma,
        "prior_weight": objective.prior_weight,
    }


def guided_step(
    output: Tensor, x: Tensor, noise: Tensor, rows: TransitionRows, *, guidance_scale: float | None
) -> tuple[Tensor, Tensor]:
    """As `gaussian.guided_step`."""
    return step_kernel.guided_step(output, x, noise, *_steps(rows, x), guidance_scale=guidance_scale)


def gaussian_log_prob(
    output: Tensor, x: Tensor, x_next: Tensor, rows: TransitionRows, *, guidance_scale: float | None
) -> Tensor:
    """As `gaussian.gaussian_log_prob`."""
    return log_prob_kernel.gaussian_log_prob(output, x, x_next, *_steps(rows, x), guidance_scale=guidance_scale)


def forward_balance(
    output: Tensor,
    output_ref: Tensor,
    x: Tensor,
    x_next: Tensor,
    rows: TransitionRows,
    reward_score_next: Tensor,
    flow_next: Tensor | None = None,
    output_old: Tensor | None = None,
    *,
    objective: Objective,
    guidance_scale: float | None,
) -> ForwardBalance:
    """As `balance.forward_balance`."""
    loss, statistics = forward_kernel.forward_balance(
        output,
        output_ref,
        x,
        x_next,
        *_steps(rows, x),
        reward_score_next,
        flow_next,
        output_old,
        by_sigma=objective.weighting == "sigma",
        trust_region_weight=objective.trust_region_weight,
        **_scalars(objective, guidance_scale),
    )
    return ForwardBalance(loss=loss, **dict(zip(forward_kernel.COLUMNS[1:], statistics, strict=True)))


def reverse_cotangent(
    output: Tensor,
    x: Tensor,
    x_next: Tensor,
    rows: TransitionRows,
    pixel_score: Tensor | None = None,
    *,
    objective: Objective,
    guidance_scale: float | None,
) -> Tensor:
    """As `balance.reverse_cotangent`."""
    return cotangent_kernel.reverse_cotangent(
        output, x, x_next, *_steps(rows, x), pixel_score, **_scalars(objective, guidance_scale)
    )


def reverse_balance(
    score: Tensor,
    score_ref: Tensor,
    rows: TransitionRows,
    flow: Tensor,
    reward_score: Tensor | None = None,
    pixel_score: Tensor | None = None,
    outputs: tuple[Tensor, Tensor] | None = None,
    *,
    objective: Objective,
    guidance_scale: float | None,
) -> Tensor:
    """As `balance.reverse_balance`."""
    return reverse_kernel.reverse_balance(
        score,
        score_ref,
        *_steps(rows, score),
        flow,
        pixel_score if reward_score is None else reward_score,
        outputs,
        by_sigma=objective.weighting == "sigma",
        at_prediction=reward_score is None,
        **_scalars(objective, guidance_scale),
    )


def reference_cotangent(
    output: Tensor,
    rows: TransitionRows,
    reward_score_next: Tensor,
    flow_next: Tensor | None = None,
    pixel_score: Tensor | None = None,
    *,
    objective: Objective,
    guidance_scale: float | None,
) -> Tensor:
    """As `reference_target.reference_cotangent`."""
    return reference_cotangent_kernel.reference_cotangent(
        output,
        *_steps(rows, output),
        reward_score_next,
        flow_next,
        pixel_score,
        guidance_scale=guidance_scale,
        beta=objective.beta,
        gamma=objective.gamma,
    )


def reference_balance(
    vjp: Tensor,
    rows: TransitionRows,
    flow: Tensor,
    reward_score_next: Tensor,
    flow_next: Tensor | None = None,
    reward_score: Tensor | None = None,
    pixel_score: Tensor | None = None,
    *,
    objective: Objective,
) -> Tensor:
    """As `reference_target.reference_balance`."""
    return reference_kernel.reference_balance(
        vjp,
        *_steps(rows, vjp),
        flow,
        reward_score_next,
        flow_next,
        pixel_score if reward_score is None else reward_score,
        beta=objective.beta,
        gamma=objective.gamma,
        by_sigma=objective.weighting == "sigma",
        at_prediction=reward_score is None,
    )


FUSED = ObjectiveOps(
    "Triton kernels",
    guided_step,
    gaussian_log_prob,
    forward_balance,
    reverse_cotangent,
    reverse_balance,
    reference_cotangent,
    reference_balance,
)
