"""The trained networks of the analytic testbed: small perceptrons for the policy's correction and for g_φ."""

import math

import torch
from torch import Tensor, nn

from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.analytic.scheduler import TRAIN_TIMESTEPS

TIME_FEATURES = 8


class Perceptron(nn.Module):
    """A perceptron of the state, the pretrained prediction of it, and the timestep. Its output is zero at initialisation.

    Its inputs include the posterior probabilities of the modes and the predicted clean state. A LoRA sees the equivalent in
    the network's features. Between modes these change so sharply that a perceptron could not learn them from the state.

    Args:
        mixture: the pretrained distribution.
        alphas: ᾱ by timestep, float64.
        width: width of the two hidden layers.
    """

    def __init__(self, mixture: GaussianMixture, alphas: Tensor, width: int) -> None:
        super().__init__()
        self.mixture, self.alphas = mixture, alphas  # not buffers, which Policy would convert to float32
        last = nn.Linear(width, mixture.dimension)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        inputs = 2 * mixture.dimension + TIME_FEATURES + len(mixture)
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture's exact ε, computed in float64, and √(1 − ᾱ) times the perceptron, which vanishes at x_T.

        Both are `[N, D, 1, 1]` float32, for states `x [N, D, 1, 1]` and `timestep [N]`.
        """
        alpha_bar = self.alphas[timestep.long()]
        state, noise = x.flatten(1).double(), (1 - alpha_bar).sqrt()[:, None]
        exact = self.mixture.noise_prediction(state, alpha_bar)
        clean = (state - noise * exact) / alpha_bar.sqrt()[:, None]
        phase = timestep[:, None] * torch.arange(1, 1 + TIME_FEATURES) * (math.pi / TRAIN_TIMESTEPS)
        posterior = self.mixture.posterior(state, alpha_bar)
        values = self.layers(torch.cat([state, clean, phase.cos(), posterior], 1).float())
        return exact.float().view_as(x), (noise.float() * values).view_as(x)


class MixtureNetwork(nn.Module):
    """A noise prediction with the interface of `UNet2DConditionModel`: ``ε(x, t) = ε_mixture(x, ᾱ_t) − √(1 − ᾱ_t) h(x, t)``.

    The perceptron h is what training adds to the score. Same arguments as `Perceptron`.
    """

    dtype = torch.float32

    def __init__(self, mixture: GaussianMixture, alphas: Tensor, width: int) -> None:
        super().__init__()
        self.perceptron = Perceptron(mixture, alphas, width)

    def forward(
        self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """ε `[N, D, 1, 1]` float32. The condition is ignored."""
        exact, change = self.perceptron(x, timestep)
        return (exact - change,)


class PerceptronFlow(nn.Module):
    """g_φ, with the interface of `fastnabla.models.flow`. Same arguments as `Perceptron`."""

    def __init__(self, mixture: GaussianMixture, alphas: Tensor, width: int) -> None:
        super().__init__()
        self.perceptron = Perceptron(mixture, alphas, width)

    def forward(self, x: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        """g `[N, D, 1, 1]` at states `x [N, D, 1, 1]` and `timestep [N]`. Prompts are ignored."""
        return self.perceptron(x, timestep)[1]
