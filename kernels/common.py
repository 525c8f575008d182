"""Device functions that the kernels share: tiles of a row, coefficients of a step, guidance, sums of a tile.

A *row* is the state of one transition, with `channels * positions` elements. A program computes one tile of one row. Tiles
do not depend on the batch, so sums by row have the same order and the same bits in any batch.

Names in kernels: `i_` index of a row, tile or step; `o_` offsets; `b_` values of a tile.
"""

import triton
import triton.language as tl

GAMMAS = ("alpha_bar", "sqrt_alpha_bar", "constant")

# Columns of the coefficient table [steps, 8], float32; precision is 1/σ².
A, B, SIGMA, PRECISION, C_CLEAN, D_CLEAN, ALPHA_BAR, ALPHA_BAR_NEXT = (tl.constexpr(i) for i in range(8))
NUM_COLUMNS = tl.constexpr(8)


@triton.jit
def coefficient(table, i_step, num_steps, COLUMN: tl.constexpr):
    """Entry of the table in row `i_step`. NaN if there is no such row, so that a wrong index reads nothing outside."""
    known = (i_step >= 0) & (i_step < num_steps)
    return tl.load(table + i_step * NUM_COLUMNS + COLUMN, mask=known, other=float("nan"))


@triton.jit
def reward_weight(alpha_bar, GAMMA: tl.constexpr):
    """γ; `GAMMA` is a position in `GAMMAS`."""
    if GAMMA == 0:
        return alpha_bar
    elif GAMMA == 1:
        return tl.sqrt(alpha_bar)
    else:
        return alpha_bar * 0 + 1.0


@triton.jit
def tile(i_tile, positions, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Channels `[BLOCK_C, 1]` and positions `[1, BLOCK_P]` of a tile, and the mask of those inside the row."""
    o_c = tl.arange(0, BLOCK_C)[:, None]
    o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    return o_c, o_p, (o_c < C) & (o_p < positions)


@triton.jit
def offsets(i_row, o_c, o_p, positions, C: tl.constexpr, LAST: tl.constexpr, TENSOR: tl.constexpr):
    """Offsets of the tile in a tensor of rows. Bit `TENSOR` of `LAST` is set if the tensor is channels-last.

    Row offsets are int64: a batch may have more than 2³¹ elements, a row may not.
    """
    start = i_row.to(tl.int64) * (positions * C)
    if (LAST >> TENSOR) & 1:
        return start + (o_p * C + o_c)
    else:
        return start + (o_c * positions + o_p)


@triton.jit
def pair_offsets(i_row, num_rows, o_c, o_p, positions, C: tl.constexpr, LAST: tl.constexpr, TENSOR: tl.constexpr):
    """Offsets of the tile in both halves of a pair."""
    o = offsets(i_row, o_c, o_p, positions, C, LAST, TENSOR)
    return o, offsets(num_rows + i_row.to(tl.int64), o_c, o_p, positions, C, LAST, TENSOR)


@triton.jit
def read(pointer, o, mask):
    return tl.load(pointer + o, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write(pointer, o, value, mask):
    tl.store(pointer + o, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def read_pair(pointer, o, o_conditional, mask, GUIDED: tl.constexpr):
    """Both halves of a guided pair. Without guidance, the same output twice."""
    b_u = read(pointer, o, mask)
    b_c = b_u
    if GUIDED:
        b_c = read(pointer, o_conditional, mask)
    return b_u, b_c


@triton.jit
def guide(b_u, b_c, w, GUIDED: tl.constexpr):
    """``o = u + w (c − u)``."""
    if GUIDED:
        return b_u + w * (b_c - b_u)
    else:
        return b_u


@triton.jit
def write_pair(pointer, o, o_conditional, b_cotangent, w, mask, GUIDED: tl.constexpr):
    """Write a cotangent of the guided output to both halves of the pair, times ``1 − w`` and ``w``."""
    if GUIDED:
        write(pointer, o, (1 - w) * b_cotangent, mask)
        write(pointer, o_conditional, w * b_cotangent, mask)
    else:
        write(pointer, o, b_cotangent, mask)


@triton.jit
def next_flow_score(
    reward_score_next, flow_next, o_reward, o_flow, mask, table, i_step, num_steps, beta, GAMMA: tl.constexpr
):
    """``h(x') = βγ'∇r(x') + g(x')`` of a tile, without g in the last step or if `flow_next` is None."""
    scale = beta * reward_weight(coefficient(table, i_step, num_steps, ALPHA_BAR_NEXT), GAMMA)
    b_score = scale * read(reward_score_next, o_reward, mask)
    if flow_next is not None:
        b_score += tl.where(i_step == num_steps - 1, 0.0, read(flow_next, o_flow, mask))
    return b_score


@triton.jit
def total(b_values):
    """Sum of a tile, in an order that depends on its shape alone."""
    return tl.sum(tl.sum(b_values, 1), 0)


@triton.jit
def largest(b_values):
    """Largest absolute value of a tile, or NaN if it contains one: the bits of non-negative floats sort like the floats, with
    NaN last."""
    b_bits = tl.abs(b_values).to(tl.int32, bitcast=True)
    return tl.max(tl.max(b_bits, 1), 0).to(tl.float32, bitcast=True)
