"""Kernel distance: the unbiased MMD² of the kernel inception distance (Bińkowski et al., *Demystifying MMD GANs*, 2018).

It compares two sets of features with the cubic kernel k(x, y) = (x·y / D + 1)³:

    MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y)

x and x' are two different samples of one set, y and y' of the other. Its mean over draws does not depend on the number of
samples, whereas the Fréchet distance is biased upwards. So it is 0 on average for two sets from one distribution, and it is
**negative** for about half of them. Its scale depends on the features: compare only values of the same probe.

torchmetrics' `KernelInceptionDistance` averages over random subsets of equal size, because all pairs of 50,000 images are too
many. Here all pairs of some thousands are used: the value is exact, needs no seed, and the sets may differ in size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def kernel_distance(
    features: Tensor, reference: Tensor, prompt: Tensor | None = None, reference_prompt: Tensor | None = None
) -> float:
    """Unbiased MMD² between `features [N, D]` and `reference [M, D]`, in float64. It can be negative.

    With prompt numbers it compares the two mixtures over prompts, with equal weights of prompts. This differs from pooling
    the samples and ignoring their prompts: a fixed number of samples per prompt makes pairs of the same prompt too rare
    among the pairs of *different* samples, so the result would be biased downwards.

    Args:
        prompt, reference_prompt: prompt numbers `[N]` and `[M]`, of the same prompts; or None, for samples of one prompt.

    Returns:
        The distance. It is nan if a feature is not finite, or if a prompt has a single sample.

    Raises:
        ValueError: only one of `prompt` and `reference_prompt` is given.
    """
    if (prompt is None) != (reference_prompt is None):
        raise ValueError("kernel_distance: pass both prompt and reference_prompt, or neither.")
    if prompt is None:
        x, y = [features.double()], [reference.double()]
    else:
        numbers = prompt.unique()
        x = [features[prompt == number].double() for number in numbers]
        y = [reference[reference_prompt == number].double() for number in numbers]
    within = _mean_kernel(x, x, same=True) + _mean_kernel(y, y, same=True)
    return within - 2 * _mean_kernel(x, y, same=False)


def _mean_kernel(a: Sequence[Tensor], b: Sequence[Tensor], same: bool) -> float:
    """Mean over all pairs of prompts of the mean kernel between a sample of `a` and one of `b`, as lists by prompt.

    If both are the `same` samples, a sample is not paired with itself.
    """
    every, sizes = torch.cat(list(b)), [len(group) for group in b]
    means = []
    for number, group in enumerate(a):  # one prompt's rows at a time, to bound the memory
        blocks = list(((group @ every.T / every.shape[1] + 1) ** 3).split(sizes, 1))
        if same:
            own, count = blocks.pop(number), len(group)
            means.append(own.fill_diagonal_(0).sum() / (count * (count - 1)))
        means.extend(block.mean() for block in blocks)
    return torch.stack(means).mean().item()
