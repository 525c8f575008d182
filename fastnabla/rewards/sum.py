"""The weighted sum of rewards, optionally normalised by each reward's standard deviation and clipped."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnabla.rewards.score import RewardFunction, score

SMALLEST_STD = 1e-6


class RunningMoments:
    """Count, mean and sum of squared deviations of all values seen, by Welford's batch update in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Add `values`, of any shape."""
        values = values.detach().double()
        count, mean = values.numel(), values.mean().item()
        shift, total = mean - self.mean, self.count + count
        self.squares += (values - mean).square().sum().item() + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation of the values seen. 1 if they hardly differ, so that rounding errors are not amplified."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > SMALLEST_STD else 1.0


class RewardSum:
    """A weighted sum of rewards.

    `parts` and `total` are raw values: they are logged, and are comparable throughout a run. Calling the sum gives the
    value that is trained on: with `normalise`, each term minus its mean, divided by its standard deviation; with `clip`,
    the sum clamped to bounds.

    The statistics change only in `observe`. Call it once per rollout, so that statistics and gradients stay the same
    during its updates. Before the first call, normalisation has no effect.

    Args:
        terms: name → reward and weight.
        normalise: divide each term by its standard deviation over all rewards observed.
        clip: largest absolute value of the sum that is trained on, in units of the normalised terms with `normalise`, of
            the raw terms otherwise. An image outside the bounds has no gradient.
        timeout: seconds that one call of a term may take, and its backward pass; None for no limit.

    Raises:
        ValueError: `clip` is not positive and finite.
    """

    def __init__(
        self,
        terms: dict[str, tuple[RewardFunction, float]],
        normalise: bool = False,
        clip: float | None = None,
        timeout: float | None = None,
    ) -> None:
        if clip is not None and not 0 < clip < math.inf:
            raise ValueError(f"reward.clip = {clip!r}: must be positive and finite, or None.")
        self.terms, self.normalise, self.clip, self.timeout = terms, normalise, clip, timeout
        self.moments = {name: RunningMoments() for name in terms}

    def parts(self, images: Tensor, prompts: Sequence[str], chunk: int | None = None) -> dict[str, Tensor]:
        """Raw, unweighted values `[B]` of every term.

        Args:
            images: `[B, 3, H, W]` in [0, 1].
            prompts: B prompts.
            chunk: largest number of images per call; None for all.

        Raises:
            RewardError: a term fails, times out, does not return a tensor `[B]`, or lacks a gradient that the images
                require.
        """
        size = chunk or max(len(images), 1)
        parts = [slice(i, i + size) for i in range(0, max(len(images), 1), size)]
        return {
            name: torch.cat([score(name, reward, images[part], prompts[part], self.timeout) for part in parts])
            for name, (reward, _) in self.terms.items()
        }

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """Raw weighted sum `[B]` of `parts`."""
        return torch.stack([weight * parts[name].float() for name, (_, weight) in self.terms.items()]).sum(0)

    def shape(self, parts: dict[str, Tensor]) -> Tensor:
        """Weighted sum `[B]` of `parts` that is trained on, normalised and clipped according to the settings."""
        if self.normalise:
            parts = {name: (parts[name] - moments.mean) / moments.std for name, moments in self.moments.items()}
        total = self.total(parts)
        return total if self.clip is None else total.clamp(-self.clip, self.clip)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.shape(self.parts(images, prompts))

    def observe(self, parts: dict[str, Tensor]) -> None:
        """Update the statistics with raw values. Synchronises with the device.

        Raises:
            FloatingPointError: a value is not finite.
        """
        for name, moments in self.moments.items():
            if not torch.isfinite(parts[name]).all():
                raise FloatingPointError(f"reward {name!r} is not finite on a sampled image.")
            moments.update(parts[name])

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The statistics of each term, as plain numbers."""
        return {name: dict(vars(moments)) for name, moments in self.moments.items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            ValueError: the terms differ.
        """
        if state.keys() != self.moments.keys():
            raise ValueError(f"statistics of the rewards {', '.join(state)} do not fit {', '.join(self.moments)}.")
        for name, values in state.items():
            vars(self.moments[name]).update(values)
