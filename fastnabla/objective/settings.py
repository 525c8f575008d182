"""Residual ∇-DB and its settings."""

import dataclasses
from typing import Literal

Backend = Literal["auto", "triton", "torch"]
Gamma = Literal["alpha_bar", "sqrt_alpha_bar", "constant"]
Weighting = Literal["score", "sigma"]
RewardGradient = Literal["lookahead", "lookahead_detached", "terminal"]


@dataclasses.dataclass(kw_only=True, slots=True)
class Objective:
    """Residual ∇-DB and its weights. Plain ∇-DB has all of them but λ, DAG-DB has β, γ and κ."""

    beta: float = 1000.0
    """β, the reward scale: the target distribution is p_ref · exp(β r). ≥ 0."""
    reward_gradient: RewardGradient = "lookahead"
    """Where ∇r is taken. "lookahead": at the one-step prediction of the clean sample, through the UNet (the paper).
    "lookahead_detached": the same without the UNet's Jacobian; one pass less, a biased direction at high noise.
    "terminal": at the finished sample, once per trajectory; two passes and nearly all decodes less, but every step
    is pushed along one and the same gradient."""
    gamma: Gamma = "alpha_bar"
    """γ, weight of the reward score by signal share ᾱ: "alpha_bar" (the paper), "sqrt_alpha_bar" or "constant"."""
    weighting: Weighting = "score"
    """Units of the residuals. "score": as they are, 1/σ (the paper; late steps dominate). "sigma": times the
    step's σ, so that every step counts in units of its own noise."""
    prior_weight: float = 1.0
    """λ, the weight of the pretrained policy's score. ≥ 0; 1 keeps the prior as it is."""
    reverse_weight: float = 1.0
    """ρ, weight of the reverse residual, which trains the flow network. ≥ 0; 0 saves two passes."""
    reverse_second_order: bool = False
    """Let the reverse residual train θ too, by second derivatives of the UNet: three passes more, attention that keeps its
    matrices, twice the memory and more, plain torch; not with networks that are compiled or checkpointed, nor xformers. Off, as in the paper's first-order form, it trains the
    flow network alone."""
    trust_region_weight: float = 1000.0
    """κ, weight of the squared distance to the outputs of the policy that sampled. ≥ 0. It acts from the second
    update of a rollout on: in the first the two policies are the same, but with rollout.replay."""

    def __post_init__(self) -> None:
        for name in ("beta", "prior_weight", "reverse_weight", "trust_region_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"objective.{name} = {value}: must be finite and not negative.")
