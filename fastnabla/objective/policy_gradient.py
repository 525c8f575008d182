"""DDPO's surrogate (Black et al., arXiv 2305.13301, equation 4, with PPO's clipping), by row.

A step of the sampler is an action; its return is the reward of the finished sample. With A the advantage of the trajectory
and D the number of elements of a state:

    −min(A w, A clip(w, 1 − ε, 1 + ε)),   w = (P_θ(x'|x) / P_old(x'|x))^{1/D}

The D-th root is not in the paper's equation. It is in the authors' code, whose log-densities are means over elements, and ε
is in its units. At the policy that sampled (w = 1) the gradient is the equation's divided by D. Away from it w is tempered,
and the estimate is biased. Without the root, w is a product over all D elements and hardly stays near 1.
"""

import torch
from torch import Tensor


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """``−min(A w, A clip(w, 1 − ε, 1 + ε))`` `[N]`; gradients flow to `log_ratio`.

    Args:
        log_ratio: log w `[N]`.
        advantage: A `[N]`.
        clip: ε.
    """
    ratio = log_ratio.exp()
    return -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip))
