"""Entropy of hue and ground together.

Finetuning can keep all hues and both grounds and still lose their combinations, such as red on dark. The entropies of hue and
of ground do not show it, but the entropy of their joint histogram does.
"""

from collections.abc import Callable

from torch import Tensor

from fastnabla.metrics.diversity import HUE_BINS, cell_entropy, entropy_ceiling, hue_bins, hue_entropy_ceiling

CELLS = 2 * HUE_BINS


def joint_entropy(hues: Tensor, dark: Tensor, prompt: Tensor) -> float:
    """Entropy of the joint histogram of 12 hues × dark or bright ground, relative to log 24 and averaged over prompts.

    n images of a prompt have at most log n of entropy, so compare only equal counts, or shares of `joint_entropy_ceiling`.

    Args:
        hues: `mean_hue` of each image `[B]`, in turns; the result is nan if one is.
        dark: whether its ground is dark `[B]`, bool, or 1 and 0.
        prompt: prompt numbers `[B]`.
    """
    return cell_entropy(2 * hue_bins(hues) + dark, CELLS, prompt)


def joint_entropy_ceiling(samples: int) -> float:
    """The expected `joint_entropy` of `samples` images per prompt with uniform hues and grounds."""
    return entropy_ceiling(CELLS, samples)


CEILINGS: dict[str, Callable[[int], float]] = {
    "hue_entropy": hue_entropy_ceiling,
    "joint_entropy": joint_entropy_ceiling,
}
"""Metric → samples per prompt → expected value for uniform cells."""
