"""The cotangent of one policy's vector-Jacobian product in the reverse residual, for both halves of its output.

Per element, with ``o = u + w (c − u)``, ``e = (x' − a x − b o)/σ²``, and p = ∂r/∂x̂0 if the reward's gradient passes through
this policy, otherwise 0:

    cotangent = λ b e + βγ d p

times 1 − w for u and w for c.

Bytes per element of a row, with bf16 outputs, float32 states and p: reads 4 (pair) + 8 (x, x') + 4 (p), writes 4; 20 in
all, 16 without p, in one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnabla.kernels.common import (
    ALPHA_BAR,
    D_CLEAN,
    GAMMAS,
    PRECISION,
    A,
    B,
    coefficient,
    guide,
    offsets,
    pair_offsets,
    read,
    read_pair,
    reward_weight,
    tile,
    write_pair,
)
from fastnabla.kernels.launching import check_steps, launch, layout, operation


@triton.jit
def _reverse_cotangent_kernel(
    # read; bits of LAST in this order
    output,
    x,
    x_next,
    pixel_score,
    table,
    step_index,
    # written, laid out as the output
    cotangent,
    # sizes
    num_rows,
    num_steps,
    positions,
    num_tiles,
    # weights
    w,
    beta,
    prior_weight,
    GUIDED: tl.constexpr,
    GAMMA: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
):
    i_row, i_tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    o_c, o_p, mask = tile(i_tile, positions, C, BLOCK_C, BLOCK_P)
    o_output, o_output_c = pair_offsets(i_row, num_rows, o_c, o_p, positions, C, LAST, 0)

    i_step = tl.load(step_index + i_row)
    a, b = coefficient(table, i_step, num_steps, A), coefficient(table, i_step, num_steps, B)

    b_u, b_c = read_pair(output, o_output, o_output_c, mask, GUIDED)
    b_x = read(x, offsets(i_row, o_c, o_p, positions, C, LAST, 1), mask)
    b_x_next = read(x_next, offsets(i_row, o_c, o_p, positions, C, LAST, 2), mask)

    scale = prior_weight * b * coefficient(table, i_step, num_steps, PRECISION)
    b_cotangent = scale * (b_x_next - a * b_x - b * guide(b_u, b_c, w, GUIDED))
    if pixel_score is not None:
        reward_scale = beta * reward_weight(coefficient(table, i_step, num_steps, ALPHA_BAR), GAMMA)
        b_pixel = read(pixel_score, offsets(i_row, o_c, o_p, positions, C, LAST, 3), mask)
        b_cotangent += reward_scale * coefficient(table, i_step, num_steps, D_CLEAN) * b_pixel
    write_pair(cotangent, o_output, o_output_c, b_cotangent, w, mask, GUIDED)


def _fake(output, *others):
    return torch.empty_like(output)


@operation(_fake)
def reverse_cotangent_op(
    output: Tensor,
    x: Tensor,
    x_next: Tensor,
    table: Tensor,
    step_index: Tensor,
    pixel_score: Tensor | None,
    guidance_scale: float | None,
    beta: float,
    gamma: str,
    prior_weight: float,
) -> Tensor:
    tensors = {"output": output, "x": x, "x_next": x_next, "pixel_score": pixel_score}
    made = layout(x, pairs=() if guidance_scale is None else ("output",), **tensors)
    check_steps(table, step_index, x)
    cotangent = torch.empty_like(output)
    launch(
        _reverse_cotangent_kernel,
        made.grid,
        x.device,
        **made.arguments(table, step_index, guidance_scale),
        **tensors,
        cotangent=cotangent,
        beta=beta,
        prior_weight=prior_weight,
        GAMMA=GAMMAS.index(gamma),
    )
    return cotangent


def reverse_cotangent(
    output: Tensor,
    x: Tensor,
    x_next: Tensor,
    table: Tensor,
    step_index: Tensor,
    pixel_score: Tensor | None = None,
    *,
    guidance_scale: float | None,
    beta: float,
    gamma: str,
    prior_weight: float,
) -> Tensor:
    """The cotangent, with shape, dtype and layout of the output; without gradient.

    Args:
        output: pair `[2N, …]`, or `[N, …]` without guidance.
        x, x_next, pixel_score: `[N, …]`; the last is ∂r/∂x̂0, or None for p = 0.
        table, step_index: as in `fastnabla.kernels.forward_balance`.
        guidance_scale, beta, gamma, prior_weight: w, β, γ, λ.

    Raises:
        ValueError: a tensor has the wrong device, shape, dtype or layout.

    Equivalent: `fastnabla.objective.balance.reverse_cotangent`.
    """
    tensors = (output.detach(), x.detach(), x_next.detach(), table, step_index)
    pixel_score = None if pixel_score is None else pixel_score.detach()
    return reverse_cotangent_op(*tensors, pixel_score, guidance_scale, beta, gamma, prior_weight)
