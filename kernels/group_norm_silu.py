"""Group normalisation followed by SiLU with frozen weights: the result, and the gradient in the input.

With m and r = 1/√(variance + eps) of a row's group, and ⟨·⟩ the mean over the group:

    z = (x − m) r,   u = weight z + bias,   y = u σ(u)
    h = weight ∂y σ(u) (1 + u (1 − σ(u)))
    ∂x = r (h − ⟨h⟩ − z ⟨h z⟩) + skip

`skip` is the gradient of a residual connection from x around the layer. Between the two directions, x, m and r are kept.

Each direction takes three launches: sums by tile and channel, their sums by row and group, and the result
(`channel_tiles.py`). The third launch goes through the tiles backwards, since the cache may still have what the first one
read last.

Each tile subtracts its own mean by channel before it squares, so variances do not cancel:

    Σ (x − m)² = Σ_tiles (Σ (x − m_tile)² + count (m_tile − m)²)

Bytes per element in bf16: forward reads 2 twice and writes 2. Backward reads 4 (∂y, x) twice and 2 (skip) once, and writes 2.
That is 3 passes over an activation forward and 6 backward, 5 without `skip`. Sums by channel are 8 bytes for 128 positions,
3% of a pass, written once and read twice forward, once backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnabla.kernels.channel_tiles import by_group, channel_tile, channel_tiles, tiles_of_group, write_sums
from fastnabla.kernels.common import read, total, write
from fastnabla.kernels.launching import forbid_second_derivatives, operation


@triton.jit
def _affine(weight, bias, b_z, o_c, C: tl.constexpr):
    """The weight by channel, and u."""
    b_weight = read(weight, o_c, o_c < C)
    return b_weight, b_weight * b_z + read(bias, o_c, o_c < C)


@triton.jit
def _backward_tile(gradient, x, weight, bias, mean, rstd, i_row, o_c, o_x, mask, C: tl.constexpr, GROUPS: tl.constexpr):
    """z and h of a tile, and r by channel."""
    b_rstd = by_group(rstd, i_row, o_c, C, GROUPS)
    b_z = (read(x, o_x, mask) - by_group(mean, i_row, o_c, C, GROUPS)) * b_rstd
    b_weight, b_u = _affine(weight, bias, b_z, o_c, C)
    b_sigmoid = tl.sigmoid(b_u)
    b_h = b_weight * read(gradient, o_x, mask) * b_sigmoid * (1 + b_u * (1 - b_sigmoid))
    return b_z, b_h, b_rstd


@triton.jit
def _tile_moments_kernel(
    x,
    # written
    sums,  # [rows, tiles, 2, C]: mean, and sum of squared deviations
    # sizes
    positions,
    num_tiles,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_row, i_tile, o_c, o_x, mask = channel_tile(tl.program_id(0), positions, num_tiles, C, BLOCK_C, BLOCK_P)
    b_x = read(x, o_x, mask)
    b_mean = tl.sum(b_x, 0, keep_dims=True) / tl.minimum(BLOCK_P, positions - i_tile * BLOCK_P)
    b_deviation = tl.where(mask, b_x - b_mean, 0.0)
    b_squares = tl.sum(b_deviation * b_deviation, 0, keep_dims=True)
    write_sums(sums, i_row, i_tile, num_tiles, o_c, b_mean, b_squares, C)


@triton.jit
def _group_moments_kernel(
    sums,
    # written, [rows, GROUPS]
    mean,
    rstd,
    # sizes
    positions,
    num_tiles,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    size = positions * (C // GROUPS)
    b_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, num_tiles, BLOCK_T):
        o_t, o, mask = tiles_of_group(start, num_tiles, C, GROUPS, BLOCK_T, BLOCK_D)
        b_sum += tl.minimum(BLOCK_P, positions - o_t * BLOCK_P) * read(sums, o, mask)
    b_mean = total(b_sum) / size
    b_squares = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, num_tiles, BLOCK_T):
        o_t, o, mask = tiles_of_group(start, num_tiles, C, GROUPS, BLOCK_T, BLOCK_D)
        b_deviation = tl.where(mask, read(sums, o, mask) - b_mean, 0.0)
        b_count = tl.minimum(BLOCK_P, positions - o_t * BLOCK_P)
        b_squares += read(sums, o + C, mask) + b_count * b_deviation * b_deviation
    tl.store(mean + tl.program_id(0), b_mean)
    tl.store(rstd + tl.program_id(0), tl.rsqrt(total(b_squares) / size + eps))


@triton.jit
def _norm_silu_kernel(
    x,
    weight,
    bias,
    mean,
    rstd,
    # written
    y,
    # sizes
    positions,
    num_tiles,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_row, _, o_c, o_x, mask = channel_tile(
        tl.num_programs(0) - 1 - tl.program_id(0), positions, num_tiles, C, BLOCK_C, BLOCK_P
    )
    b_mean, b_rstd = by_group(mean, i_row, o_c, C, GROUPS), by_group(rstd, i_row, o_c, C, GROUPS)
    _, b_u = _affine(weight, bias, (read(x, o_x, mask) - b_mean) * b_rstd, o_c, C)
    write(y, o_x, b_u * tl.sigmoid(b_u), mask)


@triton.jit
def _tile_sums_kernel(
    gradient,
    x,
    weight,
    bias,
    mean,
    rstd,
    # written
    sums,  # [rows, tiles, 2, C]: of h, and of h z
    # sizes
    positions,
    num_tiles,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_row, i_tile, o_c, o_x, mask = channel_tile(tl.program_id(0), positions, num_tiles, C, BLOCK_C, BLOCK_P)
    b_z, b_h, _ = _backward_tile(gradient, x, weight, bias, mean, rstd, i_row, o_c, o_x, mask, C, GROUPS)
    b_sum, b_product = tl.sum(b_h, 0, keep_dims=True), tl.sum(b_h * b_z, 0, keep_dims=True)
    write_sums(sums, i_row, i_tile, num_tiles, o_c, b_sum, b_product, C)


@triton.jit
def _group_means_kernel(
    sums,
    # written, [rows, GROUPS]
    mean_h,
    mean_hz,
    # sizes
    positions,
    num_tiles,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b_h, b_hz = tl.zeros([BLOCK_T, BLOCK_D], tl.float32), tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, num_tiles, BLOCK_T):
        _, o, mask = tiles_of_group(start, num_tiles, C, GROUPS, BLOCK_T, BLOCK_D)
        b_h += read(sums, o, mask)
        b_hz += read(sums, o + C, mask)
    size = positions * (C // GROUPS)
    tl.store(mean_h + tl.program_id(0), total(b_h) / size)
    tl.store(mean_hz + tl.program_id(0), total(b_hz) / size)


@triton.jit
def _norm_silu_backward_kernel(
    gradient,
    x,
    weight,
    bias,
    mean,
    rstd,
    mean_h,
    mean_hz,
    skip,
    # written; may be the gradient
    out,
    # sizes
    positions,
    num_tiles,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_row, _, o_c, o_x, mask = channel_tile(
        tl.num_programs(0) - 1 - tl.program_id(0), positions, num_tiles, C, BLOCK_C, BLOCK_P
    )
    b_z, b_h, b_rstd = _backward_tile(gradient, x, weight, bias, mean, rstd, i_row, o_c, o_x, mask, C, GROUPS)
    b_mean_h, b_mean_hz = by_group(mean_h, i_row, o_c, C, GROUPS), by_group(mean_hz, i_row, o_c, C, GROUPS)
    b_out = b_rstd * (b_h - b_mean_h - b_z * b_mean_hz)
    if skip is not None:
        b_out += read(skip, o_x, mask)
    write(out, o_x, b_out, mask)


def _fake(x, weight, bias, groups, eps):
    return torch.empty_like(x), *channel_tiles(x, weight, bias, groups).empty_moments()


@operation(_fake)
def group_norm_silu_op(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    made = channel_tiles(x, weight, bias, groups)
    y, sums, (mean, rstd) = torch.empty_like(x), made.empty_sums(), made.empty_moments()
    made.launch_by_tile(_tile_moments_kernel, x=x, sums=sums)
    made.launch_by_group(_group_moments_kernel, sums=sums, mean=mean, rstd=rstd, eps=eps)
    made.launch_by_tile(_norm_silu_kernel, x=x, weight=weight, bias=bias, mean=mean, rstd=rstd, y=y)
    return y, mean, rstd


def _fake_backward(gradient, x, mean, rstd, weight, bias, groups, skip, out):
    channel_tiles(x, weight, bias, groups, gradient=gradient, skip=skip, out=out)


@operation(_fake_backward, mutates=("out",))
def group_norm_silu_backward_op(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    skip: Tensor | None,
    out: Tensor,
) -> None:
    made = channel_tiles(x, weight, bias, groups, gradient=gradient, skip=skip, out=out)
    sums, (mean_h, mean_hz) = made.empty_sums(), made.empty_moments()
    inputs = {"gradient": gradient, "x": x, "weight": weight, "bias": bias, "mean": mean, "rstd": rstd}
    made.launch_by_tile(_tile_sums_kernel, sums=sums, **inputs)
    made.launch_by_group(_group_means_kernel, sums=sums, mean_h=mean_h, mean_hz=mean_hz)
    made.launch_by_tile(_norm_silu_backward_kernel, mean_h=mean_h, mean_hz=mean_hz, skip=skip, out=out, **inputs)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``silu(group_norm(x))`` in the dtype of `x`, and m and r by row and group, `[N, groups]` float32. They carry no gradient.

    Args:
        x: `[N, C, …]` channels-last; float32, bfloat16 or float16.
        weight, bias: `[C]`, of one of these dtypes.
        groups: a divisor of C.
        eps: added to the variance.

    Raises:
        ValueError: a tensor has the wrong device, shape, dtype or layout, or `groups` does not divide C.

    Equivalent: `fastnabla.models.group_norm_silu.group_norm_silu`.
    """
    return group_norm_silu_op(x.detach(), weight.detach(), bias.detach(), groups, eps)


def group_norm_silu_backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    skip: Tensor | None = None,
) -> Tensor:
    """∂x `[N, C, …]` of a `gradient` in `group_norm_silu(x, …)`, written over `gradient`, except while compiling.

    Args:
        gradient: `[N, C, …]` channels-last.
        x, weight, bias, groups: as for `group_norm_silu`.
        eps: not used, since `rstd` has it.
        mean, rstd: what it returned.
        skip: added to the result, `[N, C, …]` channels-last; None for 0.

    Raises:
        ValueError: as for `group_norm_silu`.
        RuntimeError: this backward pass is to be differentiated itself.

    Equivalent: `fastnabla.models.group_norm_silu.group_norm_silu_backward`.
    """
    forbid_second_derivatives()
    out = torch.empty_like(gradient) if torch.compiler.is_compiling() else gradient
    group_norm_silu_backward_op(gradient, x, mean, rstd, weight, bias, groups, skip, out)
    return out
