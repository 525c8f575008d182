"""The noise that a lower bound of σ adds to finished samples."""

import torch
from torch import Tensor

from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.transition import TransitionTable


def added_variance(mixture: GaussianMixture, table: TransitionTable, raised: TransitionTable) -> Tensor:
    """How much the steps of `raised` add to the variance of each component of finished samples, `[K, D]` or `[K, 1]`.

    The last step adds ``σ_raised² − σ²``. What an earlier step adds, later steps multiply by the square of ``∂μ/∂x``. Given
    the component, with ε the ideal prediction, that is ``a + b √(1 − ᾱ) / (ᾱ s² + 1 − ᾱ)``. This neglects that the added
    noise can change the component that a state seems to belong to.

    Args:
        mixture: distribution of the data, with the components' s².
        table: a sampler with ε-prediction.
        raised: `table.with_min_sigma(…)`.
    """
    variance = torch.zeros_like(mixture.stds)
    for i in range(len(table)):
        signal, noise = table.alpha_bar[i], table.noise_std[i].square()
        slope = table.a[i] + table.b[i] * noise.sqrt() / (signal * mixture.stds.square() + noise)
        variance = slope.square() * variance + raised.sigma[i] ** 2 - table.sigma[i] ** 2
    return variance
