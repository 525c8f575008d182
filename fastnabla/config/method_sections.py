"""The sections of the configuration that belong to single methods.

The losses they parametrise are in `fastnabla.methods.direct` and `fastnabla.objective.policy_gradient`. The docstring of
a field is its `--help` text.
"""

import dataclasses
import math
from typing import Literal

from fastnabla.utils.require import require


@dataclasses.dataclass(kw_only=True, slots=True)
class Direct:
    """Settings of ReFL, DRaFT-K (also DRaFT+ and AlignProp) and DRaFT-LV, which differentiate the reward through the sampler."""

    k: int = 1
    """draft: K, the number of final sampler steps that the gradient passes through. Each keeps a UNet graph in
    memory."""
    truncation: Literal["fixed", "random"] = "fixed"
    """draft: "random" draws K uniformly from 1 to direct.k for each update, as AlignProp does with k = sampler.steps. The
    memory plan is for the largest K."""
    kl: float = 0.0
    """draft: κ, weight of the squared difference of the policy's and the pretrained model's predicted noise, averaged over the K
    steps and all elements. It costs one more network pass for each of the K steps. NeMo-Aligner's DRaFT+ uses 1.0. 0: none."""
    redraws: int = 2
    """draft-lv: n. The finished sample is noised n times to the state before the last step, and the gradient is the
    mean over the sample itself and the n. Each takes a UNet graph and a decode. More redraws lower the variance."""
    late: float = 0.25
    """refl: the fraction of final steps from which one is drawn at random to predict the clean sample. In (0, 1]."""
    guidance_scale: float | None = None
    """refl: w of classifier-free guidance in training; evaluation always uses sampler.guidance_scale. 1: without guidance, at
    half the cost, as in the official ReFL code. None: sampler.guidance_scale."""

    def __post_init__(self) -> None:
        for name in ("k", "redraws"):
            value = getattr(self, name)
            require(value >= 1, f"direct.{name}", value, "must be at least 1.")
        require(0 < self.late <= 1, "direct.late", self.late, "must be in (0, 1].")
        require(0 <= self.kl < math.inf, "direct.kl", self.kl, "must be finite and not negative.")
        require(
            self.truncation in ("fixed", "random"), "direct.truncation", self.truncation, "must be fixed or random."
        )
        require(
            self.guidance_scale is None or 0 < self.guidance_scale < math.inf,
            "direct.guidance_scale",
            self.guidance_scale,
            "must be positive and finite; use 1 for no guidance.",
        )

    def first_late(self, num_steps: int) -> int:
        """First of the late steps of a sampler of `num_steps`; at least one step is late."""
        return num_steps - max(1, int(num_steps * self.late + 1e-9))


@dataclasses.dataclass(kw_only=True, slots=True)
class PolicyGradient:
    """Settings of the policy gradients, ddpo and dag-kl."""

    clip: float = 1e-4
    """ε of PPO's clipping: the ratio of new to old density, per element, is clipped to 1 ± ε. It has an effect from the
    second update of a rollout on; in the first the ratio is 1."""
    advantage_clip: float = 5.0
    """Advantages are clipped to this absolute value, in standard deviations: of the prompt's rewards (ddpo), or of the
    returns of an update's transitions (dag-kl)."""
    window: int = 32
    """ddpo: number of latest rewards of a prompt from which the mean and deviation of its advantages are computed."""
    min_count: int = 16
    """ddpo: a prompt with fewer rewards than this uses the mean and deviation of all rewards of the update instead."""

    def __post_init__(self) -> None:
        for name in ("clip", "advantage_clip"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"policy_gradient.{name}", value, "must be positive and finite.")
        require(self.window >= 2, "policy_gradient.window", self.window, "must be at least 2, to have a deviation.")
        require(self.min_count >= 1, "policy_gradient.min_count", self.min_count, "must be at least 1.")
