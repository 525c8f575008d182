"""DDPO's surrogate by row (Black et al., arXiv 2305.13301, equation 4, with PPO's clipping), and its settings.

A step of the sampler is an action; its return is the reward of the finished sample. With A the advantage of the trajectory
and D the number of elements of a state:

    −min(A w, A clip(w, 1 − ε, 1 + ε)),   w = (P_θ(x'|x) / P_old(x'|x))^{1/D}

The D-th root is not in the paper's equation. It is in the authors' code, whose log-densities are means over elements, and ε
is in its units. At the policy that sampled (w = 1) the gradient is the equation's divided by D. Away from it w is tempered,
and the estimate is biased. Without the root, w is a product over all D elements and hardly stays near 1.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(kw_only=True, slots=True)
class PolicyGradient:
    """DDPO."""

    clip: float = 1e-4
    """ε: the ratio of new to old density, per element, is clipped to 1 ± ε. It has an effect from the second update of a
    rollout on."""
    advantage_clip: float = 5.0
    """Largest absolute advantage, in standard deviations of the prompt's rewards."""
    window: int = 32
    """Number of each prompt's latest rewards that normalise its advantages."""
    min_count: int = 16
    """A prompt with fewer rewards than this is normalised by the update's rewards of all prompts."""

    def __post_init__(self) -> None:
        for name in ("clip", "advantage_clip"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"policy_gradient.{name} = {value}: must be positive and finite.")
        if self.window < 2:
            raise ValueError(f"policy_gradient.window = {self.window}: must be at least 2, to have a spread.")
        if not 1 <= self.min_count <= self.window:
            raise ValueError(
                f"policy_gradient.min_count = {self.min_count}: must be between 1 and policy_gradient.window = "
                f"{self.window}."
            )


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """``−min(A w, A clip(w, 1 − ε, 1 + ε))`` `[N]`; gradients flow to `log_ratio`.

    Args:
        log_ratio: log w `[N]`.
        advantage: A `[N]`.
        clip: ε.
    """
    ratio = log_ratio.exp()
    return -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip))
