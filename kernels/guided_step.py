"""One step of the sampler: ``x' = a x + b o + σ ε``, with ``o = u + w (c − u)``.

Bytes per element of a row, for a bf16 output and float32 states: reads 4 (the pair), 4 (x) and 4 (ε); writes 4 (x') and
4 (o). One launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnabla.kernels.common import (
    SIGMA,
    A,
    B,
    coefficient,
    guide,
    offsets,
    pair_offsets,
    read,
    read_pair,
    tile,
    write,
)
from fastnabla.kernels.launching import Layout, check_steps, launch, layout, operation


@triton.jit
def _guided_step_kernel(
    # read; bits of LAST in this order
    output,
    x,
    noise,
    table,
    step_index,
    # written, laid out as x
    x_next,
    guided,
    # sizes
    num_rows,
    num_steps,
    positions,
    num_tiles,
    w,
    GUIDED: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
):
    i_row, i_tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    o_c, o_p, mask = tile(i_tile, positions, C, BLOCK_C, BLOCK_P)
    o_output, o_output_c = pair_offsets(i_row, num_rows, o_c, o_p, positions, C, LAST, 0)
    o_x = offsets(i_row, o_c, o_p, positions, C, LAST, 1)

    i_step = tl.load(step_index + i_row)
    a, b = coefficient(table, i_step, num_steps, A), coefficient(table, i_step, num_steps, B)
    sigma = coefficient(table, i_step, num_steps, SIGMA)

    b_u, b_c = read_pair(output, o_output, o_output_c, mask, GUIDED)
    b_o = guide(b_u, b_c, w, GUIDED)
    b_noise = read(noise, offsets(i_row, o_c, o_p, positions, C, LAST, 2), mask)
    b_mean = a * read(x, o_x, mask) + b * b_o
    write(x_next, o_x, b_mean + sigma * b_noise, mask)
    write(guided, o_x, b_o, mask)


def _layout(output: Tensor, x: Tensor, noise: Tensor, guidance_scale: float | None) -> Layout:
    return layout(x, () if guidance_scale is None else ("output",), output=output, x=x, noise=noise)


def _fake(output, x, noise, table, step_index, guidance_scale):
    return torch.empty_like(x), _layout(output, x, noise, guidance_scale).empty("x", x)


@operation(_fake)
def guided_step_op(
    output: Tensor, x: Tensor, noise: Tensor, table: Tensor, step_index: Tensor, guidance_scale: float | None
) -> tuple[Tensor, Tensor]:
    made = _layout(output, x, noise, guidance_scale)
    check_steps(table, step_index, x)
    x_next, guided = torch.empty_like(x), made.empty("x", x)
    launch(
        _guided_step_kernel,
        made.grid,
        x.device,
        **made.arguments(table, step_index, guidance_scale),
        output=output,
        x=x,
        noise=noise,
        x_next=x_next,
        guided=guided,
    )
    return x_next, guided


def guided_step(
    output: Tensor, x: Tensor, noise: Tensor, table: Tensor, step_index: Tensor, *, guidance_scale: float | None
) -> tuple[Tensor, Tensor]:
    """The next state x' `[N, …]`, in the dtype and layout of `x`, and the guided output o `[N, …]`, in float32.

    Neither carries a gradient.

    Args:
        output: pair `[2N, …]`, or `[N, …]` without guidance.
        x: `[N, …]`.
        noise: ε `[N, …]`.
        table, step_index: as in `fastnabla.kernels.forward_balance`.
        guidance_scale: w.

    Raises:
        ValueError: a tensor has the wrong device, shape, dtype or layout.

    Equivalent: `fastnabla.objective.gaussian.guided_step`.
    """
    return guided_step_op(output.detach(), x.detach(), noise.detach(), table, step_index, guidance_scale)
