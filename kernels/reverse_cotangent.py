"""The cotangents of the reverse residual's two vector-Jacobian products, of policy and reference, for both halves.

By element, with ``o = u + w (c − u)``, ``e = (x' − a x − b o)/σ²`` and p = ∂r/∂x̂0:

    cotangent     = λ b e + βγ d p,      cotangent_ref = λ b e_ref

times 1 − w for u and w for c.

Bytes by element of a row, with bf16 outputs, float32 states and p: reads 8 (two pairs) + 8 (x, x') + 4 (p), writes 8; 28 in
all, in one launch.
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
    output_ref,
    x,
    x_next,
    pixel_score,
    table,
    step_index,
    # written, laid out as the outputs
    cotangent,
    cotangent_ref,
    # sizes
    num_rows,
    num_steps,
    positions,
    num_tiles,
    # weights
    w,
    beta,
    strength,
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
    o_ref, o_ref_c = pair_offsets(i_row, num_rows, o_c, o_p, positions, C, LAST, 1)

    i_step = tl.load(step_index + i_row)
    a, b = coefficient(table, i_step, num_steps, A), coefficient(table, i_step, num_steps, B)
    scale = strength * b * coefficient(table, i_step, num_steps, PRECISION)

    b_u, b_c = read_pair(output, o_output, o_output_c, mask, GUIDED)
    b_u_ref, b_c_ref = read_pair(output_ref, o_ref, o_ref_c, mask, GUIDED)
    b_x = read(x, offsets(i_row, o_c, o_p, positions, C, LAST, 2), mask)
    b_x_next = read(x_next, offsets(i_row, o_c, o_p, positions, C, LAST, 3), mask)

    b_drift = b_x_next - a * b_x
    b_cotangent = scale * (b_drift - b * guide(b_u, b_c, w, GUIDED))
    if pixel_score is not None:
        reward_scale = beta * reward_weight(coefficient(table, i_step, num_steps, ALPHA_BAR), GAMMA)
        b_pixel = read(pixel_score, offsets(i_row, o_c, o_p, positions, C, LAST, 4), mask)
        b_cotangent += reward_scale * coefficient(table, i_step, num_steps, D_CLEAN) * b_pixel
    write_pair(cotangent, o_output, o_output_c, b_cotangent, w, mask, GUIDED)
    b_cotangent_ref = scale * (b_drift - b * guide(b_u_ref, b_c_ref, w, GUIDED))
    write_pair(cotangent_ref, o_ref, o_ref_c, b_cotangent_ref, w, mask, GUIDED)


def _fake(output, output_ref, *others):
    return torch.empty_like(output), torch.empty_like(output_ref)


@operation(_fake)
def reverse_cotangent_op(
    output: Tensor,
    output_ref: Tensor,
    x: Tensor,
    x_next: Tensor,
    table: Tensor,
    step_index: Tensor,
    pixel_score: Tensor | None,
    guidance_scale: float | None,
    beta: float,
    gamma: str,
    strength: float,
) -> tuple[Tensor, Tensor]:
    made = layout(
        x,
        pairs=() if guidance_scale is None else ("output", "output_ref"),
        output=output,
        output_ref=output_ref,
        x=x,
        x_next=x_next,
        pixel_score=pixel_score,
    )
    check_steps(table, step_index, x)
    cotangent, cotangent_ref = torch.empty_like(output), torch.empty_like(output_ref)
    launch(
        _reverse_cotangent_kernel,
        made.grid,
        x.device,
        **made.arguments(table, step_index, guidance_scale),
        output=output,
        output_ref=output_ref,
        x=x,
        x_next=x_next,
        pixel_score=pixel_score,
        cotangent=cotangent,
        cotangent_ref=cotangent_ref,
        beta=beta,
        strength=strength,
        GAMMA=GAMMAS.index(gamma),
    )
    return cotangent, cotangent_ref


def reverse_cotangents(
    output: Tensor,
    output_ref: Tensor,
    x: Tensor,
    x_next: Tensor,
    table: Tensor,
    step_index: Tensor,
    pixel_score: Tensor | None = None,
    *,
    guidance_scale: float | None,
    beta: float,
    gamma: str,
    strength: float,
) -> tuple[Tensor, Tensor]:
    """The two cotangents, each with shape, dtype and layout of its output; without gradient.

    Args:
        output, output_ref: pairs `[2N, …]`, or `[N, …]` without guidance.
        x, x_next, pixel_score: `[N, …]`; the last is ∂r/∂x̂0, or None for none.
        table, step_index: as in `fastnabla.kernels.forward_balance`.
        guidance_scale, beta, gamma, strength: w, β, γ, λ.

    Raises:
        ValueError: a tensor has a device, shape, dtype or layout that it should not.

    Equivalent: `fastnabla.objective.balance.reverse_cotangents`.
    """
    tensors = (output.detach(), output_ref.detach(), x.detach(), x_next.detach(), table, step_index)
    pixel_score = None if pixel_score is None else pixel_score.detach()
    return reverse_cotangent_op(*tensors, pixel_score, guidance_scale, beta, gamma, strength)
