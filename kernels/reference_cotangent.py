"""The cotangent of the reference policy's vector-Jacobian product, for both halves of its output.

Per element, with ``h(x') = βγ'∇r(x') + g(x')``, without g in last rows, and p = ∂r/∂x̂0 if the reward's gradient passes
through the reference, otherwise 0:

    cotangent = βγ d p − b h(x')

times 1 − w for u and w for c, where guidance is ``o = u + w (c − u)``. The output itself is not read.

Bytes per element of a row, with bf16 outputs and flow, float32 ∇r and p: reads 4 (∇r) + 2 (g) + 4 (p), writes 4; 14 in all,
10 without p, in one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnabla.kernels.common import (
    ALPHA_BAR,
    D_CLEAN,
    GAMMAS,
    B,
    coefficient,
    next_flow_score,
    offsets,
    pair_offsets,
    read,
    reward_weight,
    tile,
    write_pair,
)
from fastnabla.kernels.launching import check_steps, launch, layout, operation


@triton.jit
def _reference_cotangent_kernel(
    # read; bits of LAST in this order, after that of the cotangent
    reward_score_next,
    flow_next,
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
    o_reward, o_flow = offsets(i_row, o_c, o_p, positions, C, LAST, 1), offsets(i_row, o_c, o_p, positions, C, LAST, 2)

    i_step = tl.load(step_index + i_row)
    b_next = next_flow_score(
        reward_score_next, flow_next, o_reward, o_flow, mask, table, i_step, num_steps, beta, GAMMA
    )
    b_cotangent = -coefficient(table, i_step, num_steps, B) * b_next
    if pixel_score is not None:
        reward_scale = beta * reward_weight(coefficient(table, i_step, num_steps, ALPHA_BAR), GAMMA)
        b_pixel = read(pixel_score, offsets(i_row, o_c, o_p, positions, C, LAST, 3), mask)
        b_cotangent += reward_scale * coefficient(table, i_step, num_steps, D_CLEAN) * b_pixel
    write_pair(cotangent, o_output, o_output_c, b_cotangent, w, mask, GUIDED)


def _fake(output, *others):
    return torch.empty_like(output)


@operation(_fake)
def reference_cotangent_op(
    output: Tensor,
    table: Tensor,
    step_index: Tensor,
    reward_score_next: Tensor,
    flow_next: Tensor | None,
    pixel_score: Tensor | None,
    guidance_scale: float | None,
    beta: float,
    gamma: str,
) -> Tensor:
    tensors = {"reward_score_next": reward_score_next, "flow_next": flow_next, "pixel_score": pixel_score}
    pairs = () if guidance_scale is None else ("output",)
    made = layout(reward_score_next, pairs=pairs, output=output, **tensors)
    check_steps(table, step_index, reward_score_next)
    cotangent = torch.empty_like(output)
    launch(
        _reference_cotangent_kernel,
        made.grid,
        output.device,
        **made.arguments(table, step_index, guidance_scale),
        **tensors,
        cotangent=cotangent,
        beta=beta,
        GAMMA=GAMMAS.index(gamma),
    )
    return cotangent


def reference_cotangent(
    output: Tensor,
    table: Tensor,
    step_index: Tensor,
    reward_score_next: Tensor,
    flow_next: Tensor | None = None,
    pixel_score: Tensor | None = None,
    *,
    guidance_scale: float | None,
    beta: float,
    gamma: str,
) -> Tensor:
    """The cotangent, with shape, dtype and layout of the output; without gradient.

    Args:
        output: the reference policy's pair `[2N, …]`, or `[N, …]` without guidance; its values are not read.
        table, step_index: as in `fastnabla.kernels.forward_balance`.
        reward_score_next: ∇r(x'), `[N, …]`.
        flow_next: g(x'), `[N, …]`; ignored in last rows. None for g ≡ 0.
        pixel_score: ∂r/∂x̂0, `[N, …]`; None for p = 0.
        guidance_scale, beta, gamma: w, β, γ.

    Raises:
        ValueError: a tensor has the wrong device, shape, dtype or layout.

    Equivalent: `fastnabla.objective.reference_target.reference_cotangent`.
    """
    scores = (tensor if tensor is None else tensor.detach() for tensor in (reward_score_next, flow_next, pixel_score))
    return reference_cotangent_op(output.detach(), table, step_index, *scores, guidance_scale, beta, gamma)
