"""The fused cotangent of the reverse residual against plain torch in float64."""

import pytest
import torch
import triton
import triton.language as tl

from fastnabla.kernels.common import offsets
from tests.kernel_cases import DTYPES, LAST, Case, assert_matches, on_each_device
from tests.kernels.operations import NO_REWARD, REVERSE_COTANGENT


@on_each_device
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [None, 5.0])
@pytest.mark.parametrize("without", [(), NO_REWARD], ids=["reward", "no_reward"])
def test_values(device, without, guidance, prior_weight, dtypes):
    case = Case.of(without=without, guidance_scale=guidance, prior_weight=prior_weight, **DTYPES[dtypes])
    assert_matches(REVERSE_COTANGENT.evaluate, case.draw(device))


@on_each_device
@pytest.mark.parametrize(
    "options",
    [
        {"steps": (0, 5)},
        {"steps": (LAST, LAST)},
        {"weighting": "sigma"},
        {"gamma": "sqrt_alpha_bar"},
        {"gamma": "constant"},
        {"beta": 0.0},
        {"prior_weight": 0.0},
    ],
    ids=str,
)
def test_options(device, options):
    assert_matches(REVERSE_COTANGENT.evaluate, Case.of(**options).draw(device))


@triton.jit
def _offsets_kernel(out, i_row, positions, C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr):
    o_c, o_p = tl.arange(0, C)[:, None], tl.arange(0, BLOCK_P)[None, :]
    tl.store(out + o_c * BLOCK_P + o_p, offsets(i_row, o_c, o_p, positions, C, LAST, 1))


@on_each_device
@pytest.mark.parametrize("last", [0b10, 0b01], ids=["channels_last", "contiguous"])
def test_offsets_of_rows_are_64_bit(device, last):
    """Row 2²⁰ of 2¹⁴ elements begins at 2³⁴, which 32 bits do not hold."""
    i_row, channels, positions, block = 2**20, 4, 2**12, 8
    out = torch.empty(channels, block, dtype=torch.int64, device=device)
    _offsets_kernel[(1,)](out, i_row, positions, C=channels, BLOCK_P=block, LAST=last)
    inside = (lambda c, p: p * channels + c) if last == 0b10 else (lambda c, p: c * positions + p)
    start = i_row * channels * positions
    assert out.tolist() == [[start + inside(c, p) for p in range(block)] for c in range(channels)]
