"""The tilted target against closed forms: for N(m, s²) and reward r = a x it is N(m + β a s², s²)."""

import itertools
import math

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from fastnabla.metrics.diversity import pairwise_distance, weighted_pairwise_distance
from fastnabla.metrics.histogram import circular_wasserstein, total_variation
from fastnabla.metrics.measures import Measures, concatenate
from fastnabla.metrics.prior import (
    equal_weights,
    frechet_between,
    frechet_distance,
    gaussian_moments,
    mean_within_prompts,
    sample_frechet_distance,
)
from fastnabla.metrics.tilted import (
    WeightedSamples,
    beta_for_ess,
    beta_for_reward,
    distances,
    effective_sample_size,
    finite_sample_floor,
    tilted_weights,
)
from tests.checks import randn

M, S, A = (0.3, -1.0), (1.0, 0.5), (1.0, 2.0)
"""Mean and standard deviation of x and slope of the reward, for two prompts; a s = 1 for both, so they tilt alike."""
QUANTILES = torch.special.ndtri((torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000)
"""Quantiles of the standard normal distribution: a deterministic sample. Its missing tails matter less than 1e-3 at
β a s ≤ 1."""


def measures(reward: Tensor, prompt: Tensor | None = None, **columns: Tensor) -> Measures:
    zeros = torch.zeros(len(reward), dtype=torch.float64)
    prompt = torch.zeros(len(reward), dtype=torch.long) if prompt is None else prompt
    return Measures(**{"hue": zeros, "dark": zeros, **columns}, prompt=prompt, reward=reward, total=reward, parts={})


def gaussians() -> Measures:
    """Samples of both prompts; the features are x."""
    x = torch.cat([m + s * QUANTILES for m, s in zip(M, S, strict=True)])
    prompt = torch.arange(2).repeat_interleave(len(QUANTILES))
    return measures(torch.tensor(A, dtype=torch.float64)[prompt] * x, prompt, features=x[:, None])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_linear_reward_shifts_a_gaussian(beta: float) -> None:
    reference = gaussians()
    target = WeightedSamples.tilted(reference, beta)
    means = [m + beta * a * s**2 for m, s, a in zip(M, S, A, strict=True)]
    assert target.mean(reference.features[:, 0]) == pytest.approx(sum(means) / 2, abs=1e-3)
    assert target.mean(reference.reward) == pytest.approx((A[0] * means[0] + A[1] * means[1]) / 2, abs=1e-3)
    assert target.divergence == pytest.approx(beta**2 / 2, abs=2e-3)  # KL = (β a s)² / 2
    # ESS / n = E[w]² / E[w²] = exp(−(β a s)²), of each prompt and of both. E[w²] weighs tails twice as far out.
    assert target.ess / len(reference) == pytest.approx(math.exp(-(beta**2)), rel=0.02)
    assert target.smallest_ess / len(QUANTILES) == pytest.approx(math.exp(-(beta**2)), rel=0.02)


def test_weighted_moments_are_those_of_the_shifted_gaussian() -> None:
    first = gaussians()[torch.arange(len(QUANTILES))]
    moments = WeightedSamples.tilted(first, 1.0).moments
    assert moments.mean.item() == pytest.approx(M[0] + 1.0, abs=1e-3)
    assert moments.covariance.item() == pytest.approx(1, abs=5e-3)
    # The prior differs by the mean alone: the squared distance is (β a s²)².
    assert frechet_between(WeightedSamples.tilted(first, 0).moments, moments) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_beta_for_ess_inverts_the_closed_form(share: float) -> None:
    reference = gaussians()
    beta = beta_for_ess(reference.reward, reference.prompt, share)
    assert beta == pytest.approx(math.sqrt(-math.log(share)), rel=0.02)
    below, above = (tilted_weights(reference.reward, reference.prompt, b) for b in (beta, beta * 1.001))
    enough = share * len(reference)
    assert effective_sample_size(below) >= enough * (1 - 1e-9)  # sums of both prompts, and of each, round apart
    assert effective_sample_size(above) < enough * (1 - 1e-4)  # by dlog ESS = −2 β² dlog β, 0.2 % or more


def test_a_prompt_with_an_outlier_limits_beta() -> None:
    """One of the n samples of the second prompt has reward 1, the others 0: the effective sample size is
    (n − 1 + e^β)² / (n − 1 + e^{2β})."""
    n, share = 100, 0.05
    reward = torch.zeros(2, n, dtype=torch.float64)
    reward[0], reward[1, 0] = randn(n, dtype=torch.float64) / 100, 1
    prompt = torch.arange(2).repeat_interleave(n)
    beta = beta_for_ess(reward.flatten(), prompt, share)
    left = (n - 1 + math.exp(beta)) ** 2 / (n - 1 + math.exp(2 * beta))
    assert left == pytest.approx(share * n, rel=1e-9)
    assert WeightedSamples.tilted(measures(reward.flatten(), prompt), beta).ess > 3 * share * n, (
        "pooled, it is not seen"
    )


def test_beta_for_reward_inverts_the_mean() -> None:
    reference = gaussians()
    mean = sum(a * m + 0.9 * (a * s) ** 2 for m, s, a in zip(M, S, A, strict=True)) / 2
    assert beta_for_reward(reference.reward, reference.prompt, mean) == pytest.approx(0.9, abs=1e-3)
    assert beta_for_reward(reference.reward, reference.prompt, mean - 1) is None, "below the prior's mean"
    assert beta_for_reward(reference.reward, reference.prompt, 100) is None, "above all rewards"
    assert beta_for_reward(reference.reward, reference.prompt, math.nan) is None


def test_effective_sample_size_falls_with_beta() -> None:
    reward, prompt = randn(300, dtype=torch.float64), torch.arange(300) % 3
    sizes = [effective_sample_size(tilted_weights(reward, prompt, beta)) for beta in torch.linspace(0, 8, 60).tolist()]
    assert sizes[0] == pytest.approx(300)
    assert all(later < earlier for earlier, later in itertools.pairwise(sizes))


def test_weights_are_within_prompts() -> None:
    reward, prompt = randn(60, dtype=torch.float64), torch.arange(60) % 4
    weights = tilted_weights(reward, prompt, 2.0)
    assert [weights[prompt == p].sum().item() for p in range(4)] == pytest.approx([0.25] * 4)
    # Z(c) of each prompt drops out: a constant added to a prompt's rewards changes nothing.
    torch.testing.assert_close(tilted_weights(reward + 10.0 * prompt, prompt, 2.0), weights, rtol=1e-9, atol=0)
    assert torch.isfinite(tilted_weights(reward * 1e6, prompt, 1e6)).all()


def test_equal_rewards_allow_any_beta() -> None:
    reward, prompt = torch.ones(10), torch.arange(10) % 2
    assert beta_for_ess(reward, prompt) == math.inf
    assert beta_for_reward(reward, prompt, 1.0) is None


def test_a_reward_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        tilted_weights(torch.tensor([0.0, math.nan]), torch.zeros(2, dtype=torch.long), 1.0)


def test_moments_with_equal_weights_are_the_usual_ones() -> None:
    features = randn(50, 3, dtype=torch.float64)
    weights = torch.cat([torch.full((40,), 1 / 40), torch.zeros(10)])
    moments = gaussian_moments(features, weights)
    torch.testing.assert_close(moments.mean, features[:40].mean(0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(moments.covariance, features[:40].T.cov(), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="one sample"):
        gaussian_moments(features, torch.eye(50)[0])


@pytest.mark.slow
def test_weighted_covariance_is_unbiased() -> None:
    """Over many draws of 4 samples with unequal weights, its mean is the variance, 1, within four standard errors."""
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = randn(20_000, 4, 1, dtype=torch.float64)
    found = torch.stack([gaussian_moments(features, weights).covariance[0, 0] for features in draws])
    assert (found.mean() - 1).abs() < 4 * found.std() / len(found) ** 0.5


@pytest.mark.parametrize("count", [200, 6])
def test_frechet_distance_is_that_of_torchmetrics(count: int) -> None:
    """Also with fewer samples than features, where the covariances are singular. torchmetrics takes eigenvalues of a product
    that is not symmetric: its zeros come out as large as 1e-8, and their roots as 1e-4."""
    a, b = randn(count, 8, dtype=torch.float64), 2 * randn(count, 8, seed=1, dtype=torch.float64) + 1
    found = frechet_between(gaussian_moments(a, equal_weights(count)), gaussian_moments(b, equal_weights(count)))
    assert found == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert sample_frechet_distance(a, b) == pytest.approx(found)


def test_the_mean_within_prompts_is_of_samples_of_the_same_prompt() -> None:
    a, b = randn(6, 2), randn(9, 2, seed=1)
    prompt, other = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([1, 0, 0] * 3)
    own = [sample_frechet_distance(a[prompt == number], b[other == number]) for number in (0, 1)]
    assert mean_within_prompts(sample_frechet_distance, a, prompt, b, other) == pytest.approx(sum(own) / 2)


def test_a_frechet_distance_that_cannot_be_estimated_is_nan() -> None:
    a, b = randn(3, 2), randn(4, 2)
    assert math.isnan(sample_frechet_distance(a[:1], b)) and math.isnan(sample_frechet_distance(a, b[:1]))
    b[0] = math.nan
    assert math.isnan(sample_frechet_distance(a, b))


def test_weighted_pairwise_distance() -> None:
    features, prompt = randn(30, 5, dtype=torch.float64), torch.arange(30) % 2
    assert weighted_pairwise_distance(features, prompt, torch.ones(30)) == pytest.approx(
        pairwise_distance(features, prompt)
    )
    weights = torch.zeros(30)
    weights[:4] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # two samples of each prompt: one distance, whatever the weights
    assert weighted_pairwise_distance(features, prompt, weights) == pytest.approx(
        pairwise_distance(features[:4], prompt[:4])
    )


def test_histogram_distances_of_single_bins() -> None:
    bins = torch.eye(12, dtype=torch.float64)
    assert total_variation(bins[0], bins[1]) == total_variation(bins[0], bins[6]) == 1
    assert circular_wasserstein(bins[0], bins[11]) == pytest.approx(1 / 12), "neighbours across the seam"
    assert circular_wasserstein(bins[0], bins[6]) == pytest.approx(1 / 2)
    assert circular_wasserstein(bins[3], bins[3]) == total_variation(bins[3], bins[3]) == 0


def test_circular_wasserstein_is_optimal_transport() -> None:
    """Against the linear program over all transport plans, which its solver solves to about 1e-7."""
    place = torch.arange(12)
    apart = (place[:, None] - place).abs()
    cost = (torch.minimum(apart, 12 - apart) / 12).flatten().numpy()
    margins = torch.cat([torch.eye(12).repeat_interleave(12, 1), torch.eye(12).repeat(1, 12)]).numpy()
    for seed in range(5):
        p, q = randn(2, 12, seed=seed, dtype=torch.float64).mul(2).softmax(1)
        plan = linprog(cost, A_eq=margins, b_eq=torch.cat([p, q]).numpy(), bounds=(0, None))
        assert circular_wasserstein(p, q) == pytest.approx(plan.fun, abs=1e-6)
        assert circular_wasserstein(p.roll(5), q.roll(5)) == pytest.approx(plan.fun, abs=1e-6)


def test_distances_have_signs_and_pool_prompts() -> None:
    prompt = torch.tensor([0, 0, 1, 1])
    low = measures(torch.zeros(4).double(), prompt, hue=torch.tensor([0.0, 0.5, 0.0, 0.5]))
    high = measures(
        torch.tensor([1.0, 1, 3, 3]).double(),
        prompt,
        hue=torch.tensor([0.0, 0.0, 0.5, 0.5]),
        dark=torch.ones(4).double(),
    )
    found = distances(*(WeightedSamples.tilted(m, 0) for m in (low, high)))
    assert found == pytest.approx(
        {"reward_gap": -2, "dark_grounds_gap": -1, "hue_total_variation": 0, "hue_wasserstein": 0}
    )


def drawn(count: int, seed: int, shift: float = 0.0) -> Measures:
    """Random samples of N(shift, 1), with r = x, a hue that depends on x, and features x."""
    x = randn(count, seed=seed, dtype=torch.float64) + shift
    return measures(x, hue=torch.special.ndtr(x), dark=(x > 0).double(), features=x[:, None])


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "beta"), [(20, 0.8), (600, 0.8), (100, 1.2), (150, 0.0)])
def test_the_floor_is_the_mean_distance_of_fresh_exact_draws(samples: int, beta: float) -> None:
    """Within four standard errors, over 60 sets of reference samples and 8 perfect samplers for each. The cases are few
    samples, whose own noise dominates; more samples than the target has effective ones; few effective samples; and β = 0,
    where the floor is the distance of two disjoint sets."""
    exact: dict[str, list[float]] = {}
    floors: dict[str, list[float]] = {}
    for seed in range(60):
        reference = drawn(600, seed)
        target = WeightedSamples.tilted(reference, beta)
        perfect = [WeightedSamples.tilted(drawn(samples, 1000 + 8 * seed + i, shift=beta), 0) for i in range(8)]
        found = [distances(sampler, target) for sampler in perfect]
        for name in found[0]:
            exact.setdefault(name, []).append(sum(abs(each[name]) for each in found) / 8)
        for name, value in finite_sample_floor(reference, beta, samples).items():
            floors.setdefault(name, []).append(value)
    assert exact.keys() == floors.keys()
    assert exact.keys() == {"reward_gap", "dark_grounds_gap", "hue_total_variation", "hue_wasserstein", "frechet"}
    for name, values in exact.items():
        a, b = torch.tensor(values), torch.tensor(floors[name])
        error = (a.var() / len(a) + b.var() / len(b)).sqrt().item()
        assert b.mean().item() == pytest.approx(a.mean().item(), abs=4 * error), name
        assert error < 0.25 * a.mean(), f"{name}: too few draws to tell"


@pytest.mark.slow
@pytest.mark.parametrize("samples", [50, 400])
def test_the_floor_of_a_mean_is_that_of_two_disjoint_sets(samples: int) -> None:
    """With β = 0 the gap of two means of N(0, 1) is normal with variance 1/n + 1/N: its mean size is √(2/π) times the root.
    The reference samples' own variance takes the place of 1."""
    reference = drawn(400, 3)
    variance = reference.reward.var(correction=0).item() * (1 / samples + 1 / 400)
    floor = finite_sample_floor(reference, 0.0, samples, replicates=2000)["reward_gap"]
    assert floor == pytest.approx(math.sqrt(2 / math.pi * variance), rel=4 * 0.75 / math.sqrt(2000))


def test_floors_fall_with_the_square_root_of_the_samples() -> None:
    few, many = (finite_sample_floor(drawn(n, 1), 0.5, n) for n in (200, 20_000))
    assert few["hue_total_variation"] / many["hue_total_variation"] == pytest.approx(10, rel=0.3)


def test_the_prior_is_told_from_the_target_by_its_floor() -> None:
    reference = drawn(600, 0)
    gap = distances(WeightedSamples.tilted(drawn(600, 1), 0), WeightedSamples.tilted(reference, 0.8))["reward_gap"]
    assert abs(gap) > 5 * finite_sample_floor(reference, 0.8, 600)["reward_gap"]


def test_measures_are_selected_and_joined_row_by_row() -> None:
    whole = drawn(10, 0)
    rows = torch.arange(10)
    again = concatenate([whole[rows[:3]], whole[rows[3:]]])
    assert len(again) == 10
    for name in ("prompt", "reward", "total", "hue", "dark", "features"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
