"""Settings of the objective, and the choices they offer."""

import dataclasses
from typing import Literal

Backend = Literal["auto", "triton", "torch"]
BetaSchedule = Literal["constant", "linear"]
Gamma = Literal["alpha_bar", "sqrt_alpha_bar", "constant"]
Weighting = Literal["score", "sigma"]
RewardGradient = Literal["lookahead", "lookahead_detached", "terminal"]
ReverseTarget = Literal["policy", "reference"]


@dataclasses.dataclass(kw_only=True, slots=True)
class Objective:
    """Residual ∇-DB. Plain ∇-DB has no λ and the paper's reverse target; DAG uses β, its schedule, γ and κ,
    Adjoint Matching β and γ, VGG-Flow β, γ and the reward gradient, Reward Score Matching β and κ."""

    beta: float = 1000.0
    """β, the reward scale: the target distribution is p_ref · exp(β r), or p_ref · exp(β r / λ) with λ ≠ 1. ≥ 0."""
    beta_schedule: BetaSchedule = "constant"
    """β over the run, for dag and dag-kl. "constant": β. "linear": from 0 in the first rollout to β halfway through the
    run's rollouts, then β, as the authors of DAG train. All updates on a rollout have the same."""
    reward_gradient: RewardGradient = "lookahead"
    """Where ∇r is taken. "lookahead": at the one-step prediction of the clean sample, through the UNet (the paper).
    "lookahead_detached": the same without the UNet's Jacobian; saves one pass, but the direction is biased at high noise.
    "terminal": at the finished sample, once per trajectory; saves two passes and nearly all decodes, but all steps of a
    trajectory get the same gradient."""
    gamma: Gamma = "alpha_bar"
    """γ, weight of the reward score as a function of ᾱ, the squared signal of a state: "alpha_bar" (the paper),
    "sqrt_alpha_bar" or "constant". For flow models, ᾱ = (1 − t)², the first is VGG-Flow's and the second that of Reward Score
    Matching."""
    weighting: Weighting = "score"
    """Units of the residuals. "score": 1/σ, unchanged (the paper; late steps dominate). "sigma": multiplied by the step's
    σ, so that each step is in units of its own noise."""
    prior_weight: float = 1.0
    """λ, weight of the pretrained policy's score. ≥ 0. The target is p_ref · exp(β r / λ); with 0 there is no prior, and no
    target."""
    reverse_weight: float = 1.0
    """ρ, weight of the reverse residual, which trains the flow network. ≥ 0; 0 saves two passes."""
    reverse_fraction: float = 1.0
    """Fraction of the inner transitions that have a reverse residual, in (0, 1]. They are drawn at random and weighted by its
    inverse, so the gradients have the same expectation. Each of the others saves two passes and, with "lookahead", a decode
    with its backward pass. The flow network's gradient is noisier. No effect with reverse_target = "reference"."""
    reverse_target: ReverseTarget = "policy"
    """What the reverse residual fits the flow to. "policy": the finetuned policy's change from the pretrained one (the
    paper). "reference": the flow at the next state, carried back through the pretrained network, which also predicts the
    clean sample for "lookahead". It does not lag behind the policy: on the 16-D analytic testbed mode masses end at 3.2
    floors instead of 6.3 with 50 steps (three seeds). On the image testbed no gain was found. An inner transition takes one
    pass less, the last one more. It assumes that the current policy sampled the transitions, and may need flow.average to
    be stable. Without a flow network it has no effect."""
    reverse_second_order: bool = False
    """Train θ with the reverse residual too, through second derivatives of the UNet. It costs three more passes, attention
    that keeps its matrices, more than twice the memory, and plain torch; networks cannot be compiled, checkpointed or use
    xformers. False is the paper's first-order form: the reverse residual trains only the flow network."""
    trust_region_weight: float = 1000.0
    """κ, weight of the squared distance to the outputs of the policy that sampled. ≥ 0. It has an effect from the second
    update of a rollout on: in the first one both policies are the same, unless rollout.replay is set. The authors' values,
    up to 2000, are for rollout.replay = 1, where it acts in every update."""

    def __post_init__(self) -> None:
        for name in ("beta", "prior_weight", "reverse_weight", "trust_region_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"objective.{name} = {value}: must be finite and not negative.")
        if not 0 < self.reverse_fraction <= 1:
            raise ValueError(
                f"objective.reverse_fraction = {self.reverse_fraction}: must be in (0, 1]. For no reverse residual, set "
                "reverse_weight = 0."
            )
