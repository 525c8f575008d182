"""The problems: a pretrained mixture and a reward, in 2 and in 16 dimensions."""

import dataclasses
import math

import torch

from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.analytic.reward import QuadraticReward
from fastnabla.utils.seeding import generator_of


@dataclasses.dataclass(frozen=True)
class Problem:
    """Finetune `mixture` to ``mixture · exp(β reward)``."""

    mixture: GaussianMixture
    reward: QuadraticReward


def ring() -> Problem:
    """2-D: four equal modes on a ring, and a concave reward that prefers the right side.

    With β = 0.6 the mass of the best mode grows by a factor of 1.9, that of the worst falls by a factor of 2.6, and all modes
    get narrower.
    """
    angle = torch.arange(4, dtype=torch.float64) * (2 * math.pi / 4)
    means = 1.2 * torch.stack([angle.cos(), angle.sin()], 1)
    mixture = GaussianMixture(torch.full((4,), 1 / 4, dtype=torch.float64), means, means.new_full((4, 1), 0.4))
    return Problem(mixture, QuadraticReward.around((1.2, 0.0), 1.0))


def cloud() -> Problem:
    """16-D: six random modes with random widths and masses, and a concave reward around a random point.

    With β = 0.6 the mass of one mode grows by a factor of 2.3, and that of another falls by a factor of 3.
    """
    generator = generator_of(0, "prompts")
    means = 0.5 * torch.randn(6, 16, dtype=torch.float64, generator=generator)
    stds = 0.3 + 0.3 * torch.rand(6, 16, dtype=torch.float64, generator=generator)
    weights = (0.5 * torch.randn(6, dtype=torch.float64, generator=generator)).softmax(0)
    centre = 0.5 * torch.randn(16, dtype=torch.float64, generator=generator)
    return Problem(GaussianMixture(weights, means, stds), QuadraticReward.around(centre.tolist(), 2.0))


PROBLEMS = {2: ring, 16: cloud}
"""Dimension → problem."""
