"""The pretrained distribution as a part of the reward, for methods whose objective has no other place for it."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.analytic.reward import QuadraticReward
from fastnabla.models.decoder import RewardFunction

WITHOUT_PRIOR = ("db", "dag")
"""Methods that go to exp(β r), whatever the pretrained policy was."""


@dataclasses.dataclass(frozen=True, eq=False)
class RewardWithPrior:
    """``r(x) + log p_ref(x) / β``, whose exponential to the power of β is the target ``p_ref exp(β r)``.

    With images this cannot be had: a diffusion model does not tell its density.

    Args:
        reward: r.
        prior: p_ref.
        beta: β > 0.
    """

    reward: QuadraticReward
    prior: GaussianMixture
    beta: float

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards `[B]` of `images [B, D, 1, 1]`, in their dtype; prompts do not count."""
        log_prob = self.prior.log_prob(images.flatten(1).double())
        return self.reward(images, prompts) + (log_prob / self.beta).to(images.dtype)


def told(method: str, reward: QuadraticReward, prior: GaussianMixture, beta: float) -> RewardFunction:
    """The reward that makes ``prior · exp(β reward)`` the target of `method`, if it has a target at all.

    Raises:
        ValueError: that would be infinite.
    """
    if method not in WITHOUT_PRIOR:
        return reward
    if not beta > 0:
        raise ValueError(f"objective.beta = 0: method = {method!r} has the prior in its reward, over beta; raise beta.")
    return RewardWithPrior(reward, prior, beta)
