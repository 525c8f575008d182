"""Quadratic rewards: tilting a Gaussian mixture by one gives a Gaussian mixture."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class QuadraticReward:
    """``r(x) = slope · x − ½ Σ_d curvature_d x_d²``.

    It is a `fastnabla.models.decoder.RewardFunction` whose "image" is the state itself.

    Args:
        slope: `[D]` float64.
        curvature: `[D]` float64; the reward is concave where this is not negative.
    """

    slope: Tensor
    curvature: Tensor

    @classmethod
    def around(cls, centre: Sequence[float], curvature: float) -> "QuadraticReward":
        """``−½ curvature ‖x − centre‖²``, up to a constant."""
        centre = torch.tensor(centre, dtype=torch.float64)
        return cls(curvature * centre, torch.full_like(centre, curvature))

    def __mul__(self, factor: float) -> "QuadraticReward":
        """``factor · r``."""
        return QuadraticReward(factor * self.slope, factor * self.curvature)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards `[B]` of `images [B, D, 1, 1]` (or `[B, D]`), in their dtype. Prompts are ignored."""
        x = images.flatten(1)
        return x @ self.slope.to(x) - 0.5 * x.square() @ self.curvature.to(x)
