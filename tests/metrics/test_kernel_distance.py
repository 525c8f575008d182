"""The kernel distance against its definition, its mean over draws and a closed form."""

import math

import pytest
import torch
from torch import Tensor

from fastnabla.metrics.kernel_distance import kernel_distance
from tests.checks import randn


def kernel(x: Tensor, y: Tensor) -> float:
    return ((x @ y).item() / len(x) + 1) ** 3


def by_definition(a: Tensor, b: Tensor) -> float:
    """The double loops."""
    total = 0.0
    for samples in (a, b):
        n = len(samples)
        pairs = [kernel(samples[i], samples[j]) for i in range(n) for j in range(n) if i != j]
        total += sum(pairs) / (n * (n - 1))
    return total - 2 * sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))


def test_is_its_definition() -> None:
    a, b = randn(5, 3, dtype=torch.float64), randn(7, 3, seed=1, dtype=torch.float64) + 1
    assert kernel_distance(a, b) == pytest.approx(by_definition(a, b), rel=1e-12)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a), rel=1e-12)


def test_prompts_are_equal_parts_of_a_mixture() -> None:
    """For mixtures of P prompts, MMD² is the sum over pairs of prompts (p, q) of E k(x_p, x_q) + E k(y_p, y_q) −
    E k(x_p, y_q) − E k(x_q, y_p), over P²."""
    a, b = randn(6, 2, dtype=torch.float64), randn(8, 2, seed=1, dtype=torch.float64)
    of_a, of_b = torch.tensor([0, 1] * 3), torch.tensor([1, 0] * 4)
    x, y = ([rows[of == p] for p in (0, 1)] for rows, of in ((a, of_a), (b, of_b)))

    def mean(u: Tensor, v: Tensor) -> float:
        return sum(kernel(i, j) for i in u for j in v) / (len(u) * len(v))

    within = by_definition(x[0], y[0]) + by_definition(x[1], y[1])
    across = 2 * (mean(x[0], x[1]) + mean(y[0], y[1]) - mean(x[0], y[1]) - mean(x[1], y[0]))
    assert kernel_distance(a, b, of_a, of_b) == pytest.approx((within + across) / 4, rel=1e-12)


def draws(count: int, size: int, seed: int, shift: float = 0.0) -> Tensor:
    return randn(count, size, 1, seed=seed, dtype=torch.float64) + shift


def check_mean(values: list[float], expected: float) -> None:
    found = torch.tensor(values)
    error = (found.std() / len(found) ** 0.5).item()
    assert found.mean().item() == pytest.approx(expected, abs=4 * error)


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.0), (0.5, 3 / 4 + 3 / 16 + 1.625**2)])
def test_the_mean_over_draws(shift: float, expected: float) -> None:
    """Of 4 samples of N(0, 1) and 6 of N(m, 1), within four standard errors over 4,000 draws. In one dimension, MMD² is
    Σ C(3, j) (E x^j − E y^j)² over j = 1, 2, 3, so 3 m² + 3 m⁴ + (m³ + 3 m)²."""
    pairs = zip(draws(4000, 4, 0), draws(4000, 6, 1, shift), strict=True)
    values = [kernel_distance(a, b) for a, b in pairs]
    check_mean(values, expected)
    assert min(values) < 0


@pytest.mark.slow
def test_equal_mixtures_have_distance_0_on_average() -> None:
    """Two prompts far apart, with 2 samples in one set and 3 in the other. Without the prompts, the distance would be
    negative."""
    a, b = draws(1000, 4, 0), draws(1000, 6, 1)
    of_a, of_b = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    a, b = a + 2.0 * of_a[:, None], b + 2.0 * of_b[:, None]
    check_mean([kernel_distance(x, y, of_a, of_b) for x, y in zip(a, b, strict=True)], 0.0)
    pooled = torch.tensor([kernel_distance(x, y) for x, y in zip(a, b, strict=True)])
    assert pooled.mean() < -4 * pooled.std() / len(pooled) ** 0.5


def test_a_single_sample_or_a_nan_gives_nan() -> None:
    a, b = randn(3, 2), randn(4, 2)
    assert math.isnan(kernel_distance(a[:1], b))
    b[0, 0] = math.nan
    assert math.isnan(kernel_distance(a, b))


def test_the_prompts_of_one_set_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="reference_prompt"):
        kernel_distance(randn(3, 2), randn(4, 2), torch.zeros(3))
