"""The tilted target p_ref · exp(βr), estimated from samples of the pretrained model.

For each prompt c the target is ``p*(x|c) = p_ref(x|c) exp(β r(x, c)) / Z(c)``. With reference samples x_i of the prompt,
self-normalised importance sampling gives

    E*[f] ≈ Σ w_i f(x_i),    w_i ∝ exp(β r(x_i, c)),  Σ w_i = 1

All prompts have equal weight, whatever their Z. The quality of the estimate is given by its effective sample size,
``1 / Σ w²`` (Kong 1992). It cannot put weight where there is no reference sample.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastnabla.metrics.diversity import hue_histogram, weighted_pairwise_distance
from fastnabla.metrics.histogram import circular_wasserstein, total_variation
from fastnabla.metrics.measures import Measures
from fastnabla.metrics.prior import Moments, frechet_between, gaussian_moments


def tilted_weights(reward: Tensor, prompt: Tensor, beta: float) -> Tensor:
    """Weights `[N]`, float64, proportional to exp(β r) within each of the P prompts and summing to 1/P per prompt.

    Args:
        reward: r `[N]`.
        prompt: prompt numbers `[N]`.
        beta: β; with 0, all samples of a prompt have equal weight.

    Raises:
        ValueError: a reward is not finite.
    """
    if not torch.isfinite(reward).all():
        raise ValueError("tilted target: the reward of a reference sample is not finite.")
    numbers = prompt.unique()
    weights = torch.empty(len(reward), dtype=torch.float64)
    for number in numbers:
        rows = prompt == number
        weights[rows] = (beta * reward[rows].double()).softmax(0) / len(numbers)
    return weights


def effective_sample_size(weights: Tensor) -> float:
    """``(Σ w)² / Σ w²``: the number of equally weighted samples that estimate a mean about as well."""
    return (weights.sum().square() / weights.square().sum()).item()


def beta_for_ess(reward: Tensor, prompt: Tensor, share: float = 0.05) -> float:
    """The largest β ≥ 0 at which each prompt's effective sample size is at least `share` of its samples; inf if all are.

    The effective sample size (ESS) decreases with β: with L = log Σ e^{βr}, log ESS = 2 L(β) − L(2β), whose derivative
    2 L'(β) − 2 L'(2β) is ≤ 0 because L is convex. Each prompt is checked by itself: the pooled ESS can be large although one
    prompt's target rests on a single sample.
    """
    groups = [prompt == number for number in prompt.unique()]

    def enough(beta: float) -> bool:
        weights = tilted_weights(reward, prompt, beta)
        return all(effective_sample_size(weights[rows]) >= share * rows.sum().item() for rows in groups)

    return _largest(enough, _scale(reward, prompt))


def beta_for_reward(reward: Tensor, prompt: Tensor, mean: float) -> float | None:
    """The β ≥ 0 at which the target's mean reward is `mean`. None if no such β exists, as for nan.

    The mean increases with β: its derivative is the variance of r under the target.
    """

    def target_mean(beta: float) -> float:
        return (tilted_weights(reward, prompt, beta) @ reward.double()).item()

    if not mean >= target_mean(0):
        return None
    beta = _largest(lambda beta: target_mean(beta) <= mean, _scale(reward, prompt))
    return None if math.isinf(beta) else beta


@dataclasses.dataclass(frozen=True)
class WeightedSamples:
    """Weighted samples that estimate a distribution. The weights `[N]` are float64 and sum to 1."""

    measures: Measures
    weights: Tensor

    @classmethod
    def tilted(cls, reference: Measures, beta: float) -> "WeightedSamples":
        """The tilted target at β, from reference samples. With β = 0: the samples themselves, with equal prompt weights."""
        return cls(reference, tilted_weights(reference.reward, reference.prompt, beta))

    @property
    def ess(self) -> float:
        """Effective sample size, with all prompts pooled."""
        return effective_sample_size(self.weights)

    @property
    def smallest_ess(self) -> float:
        """Smallest effective sample size of any prompt."""
        return min(effective_sample_size(self.weights[rows]) for rows in self._groups)

    def mean(self, values: Tensor) -> float:
        """Mean of `values [N]`."""
        return (self.weights @ values).item()

    @property
    def divergence(self) -> float:
        """KL from the unweighted samples in nats: Σ w log(n w) over each prompt's n samples, averaged over prompts.

        For a tilted target it estimates KL(p* ‖ p_ref) = β E*[r] − log Z. It is at most log n.
        """
        terms = []
        for rows in self._groups:
            share = self.weights[rows] / self.weights[rows].sum()
            terms.append(torch.special.xlogy(share, share * len(share)).sum().item())
        return sum(terms) / len(terms)

    @property
    def pairwise_distance(self) -> float | None:
        """Mean feature distance between two different samples of a prompt. None without features."""
        measures = self.measures
        if measures.features is None:
            return None
        return weighted_pairwise_distance(measures.features, measures.prompt, self.weights)

    @functools.cached_property
    def hues(self) -> Tensor:
        """Hue histogram `[12]`."""
        return hue_histogram(self.measures.hue, self.weights)

    @functools.cached_property
    def moments(self) -> Moments | None:
        """Moments of the features. None without features."""
        features = self.measures.features
        return None if features is None else gaussian_moments(features, self.weights)

    @property
    def _groups(self) -> list[Tensor]:
        prompt = self.measures.prompt
        return [prompt == number for number in prompt.unique()]


def distances(samples: WeightedSamples, target: WeightedSamples) -> dict[str, float]:
    """Distances between `samples` and `target`, with all prompts pooled.

    They are the gaps in mean reward and in the fraction of dark grounds (signed, samples minus target), the total variation
    and the circular Wasserstein distance (in turns) of the hues, and the Fréchet distance of the features.
    """
    a, b = samples.measures, target.measures
    found = {
        "reward_gap": samples.mean(a.reward) - target.mean(b.reward),
        "dark_grounds_gap": samples.mean(a.dark) - target.mean(b.dark),
        "hue_total_variation": total_variation(samples.hues, target.hues),
        "hue_wasserstein": circular_wasserstein(samples.hues, target.hues),
    }
    if samples.moments is not None and target.moments is not None:
        found["frechet"] = frechet_between(samples.moments, target.moments)
    return found


def finite_sample_floor(reference: Measures, beta: float, samples: int, replicates: int = 32) -> dict[str, float]:
    """The `distances`, in absolute value, that a perfect sampler would have on average because samples are finite.

    This is the bootstrap (Efron 1979), with the weighted reference samples in the role of the true target. Each replicate
    draws `samples` per prompt from them by weight: those of a perfect sampler. It draws as many reference samples as there
    are, uniformly, and re-weights them: the estimate of the target. Both draws are with replacement, and the distance between
    them is averaged over the replicates. A mean then varies by 1/samples + 1/ESS, as when fresh samples are compared with the
    estimated target.

    Other schemes do not have this variance. Draws by weight from one half of the reference samples, compared with the other
    half, add the noise of the halves, about 4/ESS in place of 1/ESS. Draws without replacement from a half are exact only if
    each sample's chance of being drawn, ``samples · w``, is at most 1 for the largest weight w of the half, which seldom
    holds at a β worth measuring. Beyond it they are biased towards the prior.

    The bootstrap knows only the reference samples that exist. With few effective samples, the floor of the Fréchet distance is
    too low: by about 15% at 27 effective samples per prompt. This errs on the strict side.

    Args:
        reference: reference samples.
        beta: β of the target.
        samples: samples per prompt.
        replicates: number of bootstrap replicates. The floor's own standard error is at most about 0.75 / √replicates of it.
    """
    generator = torch.Generator().manual_seed(0)
    groups = [(reference.prompt == number).nonzero()[:, 0] for number in reference.prompt.unique()]
    weights = [(beta * reference.reward[rows]).softmax(0) for rows in groups]
    total: dict[str, float] = {}
    for _ in range(replicates):
        drawn, again = [], []
        for rows, weight in zip(groups, weights, strict=True):
            drawn.append(rows[torch.multinomial(weight, samples, replacement=True, generator=generator)])
            again.append(rows[torch.randint(len(rows), (len(rows),), generator=generator)])
        sampler = WeightedSamples.tilted(reference[torch.cat(drawn)], 0)
        target = WeightedSamples.tilted(reference[torch.cat(again)], beta)
        for name, value in distances(sampler, target).items():
            total[name] = total.get(name, 0.0) + abs(value) / replicates
    return total


def _scale(reward: Tensor, prompt: Tensor) -> float:
    """A typical β: 1 over the largest range of rewards within a prompt."""
    spread = max((reward[prompt == n].max() - reward[prompt == n].min()).item() for n in prompt.unique())
    return 1 / spread if spread > 0 else 1.0


def _largest(holds: Callable[[float], bool], scale: float) -> float:
    """The largest β ≥ 0 at which `holds` is true, by bisection; inf if it is true everywhere.

    `holds` must be true at 0 and monotone. The search ends at 2⁴⁰ times `scale`, where the best samples have all the weight.
    """
    low, high = 0.0, scale
    for _ in range(40):
        if not holds(high):
            break
        low, high = high, 2 * high
    else:
        return math.inf
    while (middle := 0.5 * (low + high)) not in (low, high):
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
