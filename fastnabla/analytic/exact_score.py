"""The target's exact score in place of the finetuned network: what a sampler does when there is nothing left to learn."""

import torch
from torch import Tensor, nn

from fastnabla.analytic.mixture import GaussianMixture


class ExactScoreNetwork(nn.Module):
    """``ε(x, t) = −√(1 − ᾱ_t) ∇log p*_t(x)``, with the interface of `fastnabla.analytic.networks.MixtureNetwork`.

    Args:
        target: distribution of finished samples, whose ᾱ is `alphas[0]`.
        alphas: ᾱ by timestep, float64.
    """

    dtype = torch.float32

    def __init__(self, target: GaussianMixture, alphas: Tensor) -> None:
        super().__init__()
        self.target, self.alphas = target, alphas

    def forward(
        self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """ε `[N, D, 1, 1]` in the dtype of the states `x [N, D, 1, 1]`, at `timestep [N]`. The condition is ignored."""
        alpha_bar = self.alphas[timestep.long()]
        score = self.target.score(x.flatten(1).double(), alpha_bar / self.alphas[0])
        return ((-(1 - alpha_bar).sqrt()[:, None] * score).to(x.dtype).view_as(x),)
