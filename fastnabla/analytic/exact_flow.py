"""The exact score of the flow, which replaces the learned g_φ."""

import torch
from torch import Tensor, nn

from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.analytic.networks import MixtureNetwork
from fastnabla.models.decoder import RewardFunction
from fastnabla.objective.balance import reward_weight
from fastnabla.objective.settings import Objective


class ExactFlow(nn.Module):
    """``g(x) = λ (∇log p*(x) − ∇log p_ref(x)) − β γ ∇r(x̂0(x))``, with the interface of `fastnabla.models.flow`. No parameters.

    p* and p_ref are the target and the pretrained distribution at the noise level of x. Their ratio, to the power of
    λ, is the flow F of residual ∇-DB (arXiv 2412.07775) in the limit of infinitely many steps.

    Args:
        reference, target: distributions of finished samples, whose ᾱ is that of timestep 0, without the noise that a
            lower bound of σ adds.
        alphas: ᾱ by timestep, float64.
        network: the policy's network, which predicts the x̂0 of the look-ahead reward.
        reward: the reward that the method sees.
        objective: provides β, γ and λ.
    """

    def __init__(
        self,
        reference: GaussianMixture,
        target: GaussianMixture,
        alphas: Tensor,
        network: MixtureNetwork,
        reward: RewardFunction,
        objective: Objective,
    ) -> None:
        super().__init__()
        self.reference, self.target, self.alphas = reference, target, alphas
        self.reward, self.objective = reward, objective
        self._network = (network,)  # in a tuple, so that its parameters are not registered here

    def forward(self, x: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        """g `[N, D, 1, 1]` at states `x [N, D, 1, 1]` and `timestep [N]`, in the dtype of x. Prompts are ignored."""
        alpha_bar = self.alphas[timestep.long()]
        state, left = x.detach().flatten(1).double(), alpha_bar / self.alphas[0]
        flow = self.objective.prior_weight * (self.target.score(state, left) - self.reference.score(state, left))
        weight = self.objective.beta * reward_weight(alpha_bar, self.objective.gamma)
        return (flow - weight[:, None] * self._reward_score(x, timestep, alpha_bar)).to(x.dtype).view_as(x)

    def _reward_score(self, x: Tensor, timestep: Tensor, alpha_bar: Tensor) -> Tensor:
        """``∇_x r(x̂0(x))`` `[N, D]` float64."""
        (network,), alpha_bar = self._network, alpha_bar.view(-1, 1, 1, 1)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            noise = network(x, timestep, None)[0]
            clean = (x.double() - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
            (score,) = torch.autograd.grad(self.reward(clean, ()).sum(), x)
        return score.flatten(1).double()
