"""Statistics of paired differences against definitions and published values."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from fastnabla.study import statistics
from fastnabla.study.statistics import Difference, holm, paired


@pytest.mark.parametrize("n", [2, 4, 5])
def test_the_interval_is_that_of_all_resamples(n: int) -> None:
    """Against all nⁿ ordered resamples: no more than 2.5 % of their means are outside each bound."""
    d = np.random.default_rng(n).standard_normal(n)
    means = np.sort([np.mean(resample) for resample in itertools.product(d, repeat=n)])
    beyond = math.ceil(0.025 * n**n) - 1
    found = paired(d)
    assert (found.low, found.high) == pytest.approx((means[beyond], means[-1 - beyond]))
    assert found.mean == pytest.approx(d.mean()) and found.n == n


def test_random_resamples_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    d = [0.3, -0.1, 0.8, 0.4, 0.35, 1.2, -0.4, 0.6]
    exact = paired(d)
    monkeypatch.setattr(statistics, "ENUMERATED", 7)
    drawn = paired(d)
    assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.01)
    assert drawn == paired(d), "the seed is fixed"


@pytest.mark.parametrize(("n", "coverage"), [(2, 0.50), (3, 0.75), (4, 0.80), (5, 0.83), (6, 0.86)])
def test_the_coverage_in_the_docstring(n: int, coverage: float) -> None:
    """Of the mean of Gaussian differences, within four standard errors. With three seeds it is 1 − 2/2³: the interval is from
    the smallest to the largest difference."""
    draws = np.random.default_rng(0).standard_normal((4000, n))
    bounds = np.array([statistics._bootstrap_interval(d) for d in draws])
    found = ((bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)).mean()
    assert found == pytest.approx(coverage, abs=0.005 + 4 * math.sqrt(coverage * (1 - coverage) / len(draws)))
    assert f"{coverage:.0%}".replace("%", " %") in statistics.__doc__


def test_p_is_that_of_the_paired_t_test() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 6))
    assert paired(a - b).p == pytest.approx(ttest_rel(a, b).pvalue)


@pytest.mark.parametrize("d", [[0.2], [0.3 - 0.1, 0.5 - 0.3, 0.2], [0.0, 0.0], [1.0, math.nan, 2.0], [1.0, math.inf]])
def test_what_cannot_be_tested_is_nan_and_claims_nothing(d: list[float]) -> None:
    found = paired(d)
    assert math.isnan(found.p) and not found.holds(found.p)
    assert math.isnan(found.mean) == (not all(map(math.isfinite, d)))
    assert found.low == pytest.approx(found.high, nan_ok=True)
    assert math.isnan(found.low) == (len(d) == 1 or math.isnan(found.mean))


@pytest.mark.parametrize("n", [2, 6])
def test_the_difference_that_is_needed_has_the_adjusted_p_of_the_level(n: int) -> None:
    d = np.random.default_rng(n).standard_normal(n)
    shifted = paired(d - d.mean() + paired(d).needed(family=26))
    assert holm([shifted.p, *[1.0] * 25])[0] == pytest.approx(0.05)


def test_no_differences_are_refused() -> None:
    with pytest.raises(ValueError, match="no differences"):
        paired([])


def test_a_claim_needs_the_test_and_the_interval() -> None:
    above, across = Difference(1.0, 0.1, 2.0, 0.01, 6, 0.2), Difference(1.0, -0.1, 2.0, 0.01, 6, 0.2)
    assert above.holds(0.04) and Difference(-1.0, -2.0, -0.1, 0.01, 6, 0.2).holds(0.04)
    assert not (above.holds(0.05) or across.holds(0.04) or above.holds(math.nan))


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # as p.adjust of R
    assert holm([0.6, 0.5]) == [1, 1] and holm([]) == [] and holm([0.03]) == [0.03]
    assert holm([math.nan, 0.01, 0.02]) == pytest.approx([math.nan, 0.03, 0.04], nan_ok=True)
