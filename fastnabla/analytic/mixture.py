"""Gaussian mixtures: their diffused scores and their tilts by a quadratic reward have closed forms."""

import dataclasses
import math

import torch
from torch import Tensor

from fastnabla.analytic.reward import QuadraticReward


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianMixture:
    """``p(x) = Σ_k w_k N(x; m_k, diag(s_k²))`` in D dimensions, float64.

    Args:
        weights: w `[K]`, positive, with sum 1.
        means: m `[K, D]`.
        stds: s `[K, D]`, or `[K, 1]` for isotropic components; positive.

    Raises:
        ValueError: a shape, dtype or value is invalid.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __post_init__(self) -> None:
        count, dimension = self.means.shape
        if self.weights.shape != (count,) or self.stds.shape not in ((count, dimension), (count, 1)):
            raise ValueError(
                f"weights {tuple(self.weights.shape)}, means {tuple(self.means.shape)}, stds {tuple(self.stds.shape)}: "
                "expected [K], [K, D] and [K, D] or [K, 1]."
            )
        for name in ("weights", "means", "stds"):
            value = getattr(self, name)
            if value.dtype != torch.float64:
                raise ValueError(f"{name} has dtype {value.dtype}, expected torch.float64; convert it.")
            if not value.isfinite().all() or (name != "means" and bool((value <= 0).any())):
                raise ValueError(f"{name} = {value.tolist()}: must be finite, and weights and stds positive.")
        if abs(self.weights.sum().item() - 1) > 1e-9:
            raise ValueError(f"weights = {self.weights.tolist()}: sum to {self.weights.sum().item()}; normalise them.")

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def dimension(self) -> int:
        """D."""
        return self.means.shape[1]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws `[count, D]`."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dimension, dtype=torch.float64, generator=generator)
        return self.means[component] + self.stds[component] * noise

    def diffused(self, alpha_bar: float) -> "GaussianMixture":
        """The distribution of ``x_t = √ᾱ x_0 + √(1 − ᾱ) ε``, which is also a mixture, for 0 < ᾱ ≤ 1."""
        stds = (alpha_bar * self.stds.square() + 1 - alpha_bar).sqrt()
        return GaussianMixture(self.weights, math.sqrt(alpha_bar) * self.means, stds)

    def noised(self, variance: Tensor) -> "GaussianMixture":
        """The distribution of ``x + ξ`` with Gaussian noise ξ of `variance`, `[K, D]` or `[K, 1]`, by component."""
        return GaussianMixture(self.weights, self.means, (self.stds.square() + variance).sqrt())

    def before_noise(self, noised: "GaussianMixture", tilted: "GaussianMixture") -> "GaussianMixture":
        """The distribution of x given that ``x + ξ``, with the distribution `noised`, has the distribution `tilted` instead.

        Both mixtures have the components of this one. Given a component, x and x + ξ are jointly Gaussian: x has mean
        ``m + κ (x + ξ − m)`` and variance ``κ v``, with v the variance of ξ and ``κ = s²/(s² + v)``.
        """
        gain = (self.stds / noised.stds).square()
        means = self.means + gain * (tilted.means - noised.means)
        variances = gain * (noised.stds.square() - self.stds.square()) + (gain * tilted.stds).square()
        return GaussianMixture(tilted.weights, means, variances.sqrt())

    def tilted(self, reward: QuadraticReward, beta: float) -> "GaussianMixture":
        """``p(x) exp(β r(x)) / Z``: completing the square shifts, narrows and re-weights each component.

        Raises:
            ValueError: Z is infinite, because exp(β r) with a convex reward grows faster than a component decays.
        """
        precision = 1 / self.stds.square() + beta * reward.curvature
        if bool((precision <= 0).any()):
            raise ValueError(f"beta = {beta}: exp(β r) grows faster than the mixture decays; lower beta.")
        means = (self.means / self.stds.square() + beta * reward.slope) / precision
        squares = precision * means.square() - (self.means / self.stds).square()
        log_mass = 0.5 * (squares - (precision * self.stds.square()).log()).sum(1)
        weights = (self.weights.log() + log_mass).softmax(0)
        return GaussianMixture(weights, means, precision.rsqrt())

    def mean_reward(self, reward: QuadraticReward) -> float:
        """``E r(x)``."""
        squares = self.means.square() + self.stds.square()
        return (self.weights @ (self.means @ reward.slope - 0.5 * squares @ reward.curvature)).item()

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(x)`` `[N]` of `x [N, D]`."""
        return self._log_joint(x, *self._moments(x.new_ones(1))).logsumexp(1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probabilities `[N, K]` of the components, given `x [N, D]`."""
        return self.posterior(x, x.new_ones(1))

    def posterior(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """`responsibilities` `[N, K]` of the mixture diffused to ᾱ; same arguments as `score`."""
        return self._log_joint(x, *self._moments(alpha_bar)).softmax(1)

    def score(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """``∇ log p_ᾱ(x)`` `[N, D]` of the mixture diffused to ᾱ.

        Args:
            x: `[N, D]` float64; gradients flow to it.
            alpha_bar: ᾱ of each row, `[N]` float64.
        """
        means, variances = self._moments(alpha_bar)
        responsibilities = self._log_joint(x, means, variances).softmax(1)
        return (responsibilities[..., None] * (means - x[:, None]) / variances).sum(1)

    def noise_prediction(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """``E[ε | x_t = x] = −√(1 − ᾱ) ∇ log p_ᾱ(x)`` `[N, D]`: the ideal ε-prediction; same arguments as `score`."""
        return -(1 - alpha_bar).sqrt()[:, None] * self.score(x, alpha_bar)

    def _moments(self, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of the diffused components, `[N, K, D]`."""
        signal = alpha_bar[:, None, None]
        return signal.sqrt() * self.means, signal * self.stds.square() + 1 - signal

    def _log_joint(self, x: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        """``log w_k N(x; …)`` `[N, K]`."""
        squares = (x[:, None] - means).square() / variances
        variances = variances.expand_as(squares)
        return self.weights.log() - 0.5 * (squares + variances.log() + math.log(2 * math.pi)).sum(2)
