"""Group normalisation with SiLU by Triton's kernels, against autograd through torch's layers in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastnabla.kernels.group_norm_silu import group_norm_silu, group_norm_silu_backward
from tests.checks import randn, relative_error
from tests.kernel_cases import in_channels_last, on_each_device, poisoned_memory

EPS = 1e-6
SHAPES = {  # shape of x, groups
    "several_tiles": ((2, 64, 12, 13), 8),  # 156 positions, 128 a tile
    "groups_across_tiles": ((1, 96, 5, 7), 4),  # 24 channels a group, 64 a tile
    "many_tiles_of_one_group": ((1, 96, 33, 35), 1),  # 10, of which the second launch adds 8 at a time
    "32_groups": ((1, 64, 3, 5), 32),
    "odd_group": ((3, 6, 7, 5), 2),
    "one_position": ((2, 8, 1, 1), 2),
    "one_element_a_group": ((2, 5, 1, 1), 5),
    "sequence": ((2, 10, 7), 2),
}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}
"""The arithmetic is float32, with errors of a few roundings, 2⁻²⁴ each. In half precision the result is rounded once, by half
a unit in the last place at most."""
on_shapes = pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES)


def batch(
    shape: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32, mean: float = 1.0
) -> dict[str, Tensor]:
    """x, the gradient, the residual connection's gradient, weight and bias."""
    x, gradient, skip = (in_channels_last(randn(*shape, seed=seed)).to(device, dtype) for seed in range(3))
    weight, bias = (randn(shape[1], seed=seed).to(device, dtype) for seed in (3, 4))
    return {"x": x + mean, "gradient": gradient, "skip": skip, "weight": 1 + 0.3 * weight, "bias": 0.3 * bias}


def evaluate(
    x: Tensor, gradient: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """The result, and the gradient in x."""
    y, mean, rstd = group_norm_silu(x, weight, bias, groups, EPS)
    with torch.no_grad():
        return y, group_norm_silu_backward(gradient.clone(), x, mean, rstd, weight, bias, groups, EPS, skip)


def by_autograd(
    x: Tensor, gradient: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """The same in float64."""
    x, gradient, weight, bias = (tensor.double() for tensor in (x, gradient, weight, bias))
    x.requires_grad_()
    y = functional.silu(functional.group_norm(x, groups, weight, bias, EPS))
    return y.detach(), torch.autograd.grad(y, x, gradient)[0] + (0 if skip is None else skip.double())


@pytest.mark.slow
@on_each_device
@on_shapes
def test_accuracy(shape, groups, device):
    held = batch(shape, device)
    for actual, exact in zip(evaluate(**held, groups=groups), by_autograd(**held, groups=groups), strict=True):
        assert actual.stride() == held["x"].stride()
        assert relative_error(actual, exact) < TOLERANCE[torch.float32]


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accuracy_in_half_precision(dtype, device):
    shape, groups = SHAPES["odd_group"]
    held = batch(shape, device, dtype)
    for actual, exact in zip(evaluate(**held, groups=groups), by_autograd(**held, groups=groups), strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, exact) < TOLERANCE[dtype]


@on_each_device
def test_without_a_residual_connection(device):
    held = {**batch((2, 6, 5, 7), device), "skip": None}
    for actual, exact in zip(evaluate(**held, groups=2), by_autograd(**held, groups=2), strict=True):
        assert relative_error(actual, exact) < TOLERANCE[torch.float32]


@pytest.mark.slow
@on_each_device
def test_a_mean_of_a_hundred_deviations(device):
    """Means of tiles and groups are rounded by up to 100 · 2⁻²⁴ = 6e-6 deviations. The mean of the squares minus the square
    of the mean, in float32, would give a variance wrong by up to 100² · 2⁻²⁴ = 6e-4 of itself."""
    held = batch((1, 64, 12, 13), device, mean=100.0)
    for actual, exact in zip(evaluate(**held, groups=8), by_autograd(**held, groups=8), strict=True):
        assert relative_error(actual, exact) < 1e-5
    _, _, rstd = group_norm_silu(held["x"], held["weight"], held["bias"], 8, EPS)
    variance = held["x"].double().reshape(8, -1).var(1, correction=0)
    ones = torch.ones_like(variance)
    torch.testing.assert_close(rstd[0].double().square() * (variance + EPS), ones, rtol=0, atol=5e-6)


@on_each_device
def test_eps(device):
    """A variance of 0 leaves 1 / √eps."""
    held = batch((1, 4, 3, 3), device)
    constant = in_channels_last(torch.full_like(held["x"], 7.0))
    y, mean, rstd = group_norm_silu(constant, held["weight"], held["bias"], 2, 0.25)
    assert (mean.tolist(), rstd.tolist()) == ([[7, 7]], [[2, 2]])
    torch.testing.assert_close(y, functional.silu(held["bias"]).view(1, 4, 1, 1).expand_as(y))


@pytest.mark.slow
@on_each_device
def test_same_bits_for_any_batch(device):
    """Two rows in the other order as in the whole batch."""
    shape, groups = SHAPES["odd_group"]
    held = batch(shape, device)
    some = torch.tensor([2, 0], device=device)
    picked = {**held, **{name: in_channels_last(held[name][some]) for name in ("x", "gradient", "skip")}}
    for whole, part in zip(evaluate(**held, groups=groups), evaluate(**picked, groups=groups), strict=True):
        assert torch.equal(whole[some], part)


@pytest.mark.slow
@on_each_device
def test_everything_is_written(device):
    """Memory that is allocated without values is NaN the second time."""
    shape, groups = SHAPES["groups_across_tiles"]
    held = batch(shape, device)
    expected = evaluate(**held, groups=groups)
    with poisoned_memory():
        again = evaluate(**held, groups=groups)
    for one, two in zip(again, expected, strict=True):
        assert torch.equal(one, two)


def test_the_gradient_is_overwritten():
    held = batch((1, 4, 3, 3))
    y, mean, rstd = group_norm_silu(held["x"], held["weight"], held["bias"], 2, EPS)
    assert not y.requires_grad
    with torch.no_grad():
        out = group_norm_silu_backward(
            held["gradient"], held["x"], mean, rstd, held["weight"], held["bias"], 2, EPS, held["skip"]
        )
    assert out is held["gradient"]


def test_no_second_derivatives():
    held = batch((1, 4, 3, 3))
    moments = group_norm_silu(held["x"], held["weight"], held["bias"], 2, EPS)[1:]
    with pytest.raises(RuntimeError, match="the kernels have no second derivatives"):
        group_norm_silu_backward(held["gradient"], held["x"], *moments, held["weight"], held["bias"], 2, EPS)


@on_each_device
def test_zero_rows(device):
    held = batch((0, 4, 3, 3), device)
    assert [tensor.shape for tensor in evaluate(**held, groups=2)] == [(0, 4, 3, 3)] * 2


ONES = torch.ones(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
WRONG = {
    "layout": ({"x": torch.ones(1, 4, 3, 3)}, r"x has .* strides \(36, 9, 3, 1\): expected channels-last; pass x.cont"),
    "strides": ({"x": ONES[:, :, ::2]}, r"x has .* expected contiguous or channels-last"),
    "dtype": ({"x": ONES.double()}, "x has dtype torch.float64"),
    "groups": ({"groups": 3}, "groups = 3: expected a divisor of the 4 channels"),
    "no_group": ({"groups": 0}, "groups = 0: expected a divisor of the 4 channels"),
    "weight": (
        {"weight": torch.ones(5)},
        r"weight is torch.float32 \(5,\) on cpu .* expected contiguous \(4,\) on cpu",
    ),
    "bias": ({"bias": torch.ones(4).double()}, "bias is torch.float64"),
    "every_other": ({"bias": torch.ones(8)[::2]}, r"bias is .* with strides \(2,\), expected contiguous"),
    "large": ({"x": torch.ones(1, 1, 1, 1).expand(1, 4, 2**15, 2**14)}, "expected .* elements a row"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(changes, message):
    held = {"x": ONES, "weight": torch.ones(4), "bias": torch.zeros(4), "groups": 2}
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{**held, **changes}, eps=EPS)


def test_a_wrong_residual_gradient():
    with pytest.raises(ValueError, match=r"skip has shape \(1, 4, 3, 2\), expected \(1, 4, 3, 3\)"):
        evaluate(ONES, ONES, ONES[..., :2], torch.ones(4), torch.zeros(4), 2)
