"""How diverse samples are, by a mixture's modes: how many are in use, and how wide each is. Collapse shows as fewer and
narrower ones."""

import torch
from torch import Tensor

from fastnabla.analytic.distance import mode_masses
from fastnabla.analytic.mixture import GaussianMixture


def effective_number(masses: Tensor) -> float:
    """Exponential of the entropy of `masses [K]` of sum 1: K if all are alike, 1 if there is but one."""
    return torch.special.entr(masses).sum().exp().item()


def effective_modes(samples: Tensor, mixture: GaussianMixture) -> float:
    """`effective_number` of the mode masses of `samples [N, D]`."""
    return effective_number(mode_masses(samples, mixture))


def mode_width(samples: Tensor, mixture: GaussianMixture) -> float:
    """Root mean square distance of `samples [N, D]` from their own modes' means, over that of draws from `mixture`.

    A sample counts for each mode by its responsibility; so for the mixture's own draws this tends to 1, however much the
    modes overlap.
    """
    belongs = mixture.responsibilities(samples)
    mass = belongs.sum(0)
    means = (belongs.T @ samples) / mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, None]
    squares = (samples[:, None] - means).square().sum(2)
    exact = mixture.weights @ mixture.stds.square().expand_as(mixture.means).sum(1)
    return ((belongs * squares).sum() / len(samples) / exact).sqrt().item()
