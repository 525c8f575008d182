"""The surrogate of a policy gradient by row (Black et al., arXiv 2305.13301, equation 4, with PPO's clipping).

A step of the sampler is an action. With A its advantage and D the number of elements of a state:

    −min(A w, A clip(w, 1 − ε, 1 + ε)),   w = (P_θ(x'|x) / P_old(x'|x))^{1/D}

The D-th root is not in the paper's equation. It is in the authors' code, whose log-densities are means over elements, and ε
is in its units. At the policy that sampled (w = 1) the gradient is the equation's divided by D. Away from it w is tempered,
and the estimate is biased. Without the root, w is a product over all D elements and hardly stays near 1.
"""

import torch
from torch import Tensor

SMALLEST_STD = 1e-8


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """``−min(A w, A clip(w, 1 − ε, 1 + ε))`` `[N]`; gradients flow to `log_ratio`.

    Args:
        log_ratio: log w `[N]`.
        advantage: A `[N]`.
        clip: ε.
    """
    ratio = log_ratio.exp()
    return -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip))


def is_clipped(ratio: Tensor, clip: float) -> Tensor:
    """Whether w `[N]` lies outside 1 ± ε, `[N]` bool."""
    return (ratio - 1).abs() > clip


def is_flat(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Whether `clipped_surrogate` has no gradient, `[N]` bool: A has moved w out of 1 ± ε already. Where w is out on the other side,
    the minimum is A w.

    Args:
        ratio: w `[N]`.
        advantage: A `[N]`.
        clip: ε.
    """
    return (ratio - 1) * advantage.sign() > clip


def leave_one_out_advantages(returns: Tensor, limit: float) -> Tensor:
    """Advantages `[N]` of returns `[N]`, normalised by the other rows and clipped.

    ``A_i = (R_i − b_i) / s_i``, where b_i is the mean of the other rows' returns and s_i² the mean of their squared
    ``R_j − b_j``. The baseline b_i is independent of row i, so it adds no bias. Returns that are not finite do not count, and
    their advantage is 0.

    Args:
        returns: R.
        limit: largest absolute advantage.
    """
    values, finite = returns.double(), returns.isfinite()
    values = torch.where(finite, values, 0)
    others = (finite.sum() - 1).clamp(min=1)
    difference = torch.where(finite, values - (values.sum() - values) / others, 0)
    square = difference.square()
    std = ((square.sum() - square).clamp(min=0) / others).sqrt()
    return (difference / (std + SMALLEST_STD)).clamp(-limit, limit).to(returns.dtype)
