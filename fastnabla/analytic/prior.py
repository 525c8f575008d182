"""A reward that includes the pretrained distribution, for methods whose objective does not."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.analytic.reward import QuadraticReward
from fastnabla.models.decoder import RewardFunction

WITHOUT_PRIOR = ("db", "dag", "dag-kl")
"""Methods whose target is exp(β r), independent of the pretrained policy."""


@dataclasses.dataclass(frozen=True, eq=False)
class RewardWithPrior:
    """``r(x) + log p_ref(x) / β``. With β it gives the target ``p_ref exp(β r)``.

    It is not available for images: the density of a diffusion model is unknown.

    Args:
        reward: r.
        prior: p_ref.
        beta: β > 0.
    """

    reward: QuadraticReward
    prior: GaussianMixture
    beta: float

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards `[B]` of `images [B, D, 1, 1]`, in their dtype. Prompts are ignored."""
        log_prob = self.prior.log_prob(images.flatten(1).double())
        return self.reward(images, prompts) + (log_prob / self.beta).to(images.dtype)


def reward_for_method(method: str, reward: QuadraticReward, prior: GaussianMixture, beta: float) -> RewardFunction:
    """The reward with which ``prior · exp(β reward)`` is the target of `method`, if the method has a target.

    Raises:
        ValueError: β is 0, but the method needs the prior, divided by β, in its reward.
    """
    if method not in WITHOUT_PRIOR:
        return reward
    if not beta > 0:
        raise ValueError(
            f"objective.beta = 0: method = {method!r} needs log p_ref / beta in its reward; set beta above 0."
        )
    return RewardWithPrior(reward, prior, beta)
