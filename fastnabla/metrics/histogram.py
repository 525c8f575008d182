"""Distances between two circular histograms `[K]`, such as those of hues. Each sums to 1."""

from torch import Tensor


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of absolute differences, in [0, 1]: the mass that must move to another bin.

    It ignores the order of the bins: a move to the next bin costs as much as one across the circle.
    """
    return 0.5 * (p - q).abs().sum().item()


def circular_wasserstein(p: Tensor, q: Tensor) -> float:
    """Wasserstein-1 distance on the circle, in turns: at most 1/2.

    It is the integral of |F − G − α|, where F and G are the cumulative histograms from any starting bin and α is the median
    of F − G (Rabin, Delon, Gousseau, *Transportation distances on the circle*, 2011).
    """
    flow = (p - q).cumsum(0)
    return (flow - flow.median()).abs().mean().item()
