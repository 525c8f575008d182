"""DAG-DB by row (Zhang et al., "Improving GFlowNets for Text-to-Image Diffusion Alignment", arXiv 2406.00633).

Detailed balance between the policy and DDPM's noising kernel P_B, with a learned flow F of states:

    F(x) P_θ(x'|x) = F(x') P_B(x|x'),   log F(x) = βγ r(x̂0(x)) + D h_φ(x),   log F(x_T) = βγ r(x_T)

The residual is the difference of both sides' logarithms, divided by the number of elements D. The loss is its square:

    δ = (log F(x) + log P_θ(x'|x) − log F(x') − log P_B(x|x')) / D

The paper's flow looks forward with γ = 1. Only its log-densities are means over elements, so its β is ours divided by D.
Gradients flow to θ through log P_θ and to φ through both flows; rewards and P_B carry none. DAG-DB uses only the
reward's values.

DAG-KL (`fastnabla.methods.dag_kl`) trains φ with the same loss and θ with the policy gradient of

    KL(P_θ(x'|x) ‖ F(x') P_B(x|x') / F(x)),   ∇_θ KL = E[∇_θ log P_θ(x'|x) · D δ]

so −δ is the return of a step.
"""

from torch import Tensor

from fastnabla.objective.balance import reward_weight
from fastnabla.objective.gaussian import full
from fastnabla.objective.settings import Objective


def log_flow(
    reward: Tensor, network: Tensor | None, alpha_bar: Tensor, elements: int, *, objective: Objective
) -> Tensor:
    """``log F / D`` of N states, `[N]`. Gradients flow to `network`.

    Args:
        reward: r `[N]` of the predicted clean samples, or of finished samples.
        network: output of the flow network `[N, …]`, whose mean over elements is h_φ; None at finished samples.
        alpha_bar: ᾱ of the states, N numbers.
        elements: D.
        objective: β and γ.
    """
    value = objective.beta * reward_weight(alpha_bar.flatten(), objective.gamma) * full(reward.detach()) / elements
    return value if network is None else value + full(network).flatten(1).mean(1)


def balance_residual(
    log_flow: Tensor, log_prob: Tensor, log_flow_next: Tensor, log_noising: Tensor, elements: int
) -> Tensor:
    """δ `[N]`. The flows are per element; the log-densities are sums over elements."""
    return log_flow - log_flow_next + (log_prob - log_noising) / elements
