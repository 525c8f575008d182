"""The trained networks of the analytic testbed: two small perceptrons, for the policy's residual and for g_φ."""

import math

import torch
from torch import Tensor, nn

from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.analytic.scheduler import TRAIN_TIMESTEPS

TIME_FEATURES = 8


class Perceptron(nn.Module):
    """A function of a state, what the pretrained model makes of it, and the timestep; zero at first.

    It sees the modes' posterior probabilities and the prediction made of them because a LoRA does, in the network's
    features: between modes they turn from one to the other so sharply that states alone would not tell a perceptron.

    Args:
        mixture: the pretrained distribution.
        alphas: ᾱ by timestep, float64.
        width: of its two hidden layers.
    """

    def __init__(self, mixture: GaussianMixture, alphas: Tensor, width: int) -> None:
        super().__init__()
        self.mixture, self.alphas = mixture, alphas  # no buffers, which Policy would make float32
        last = nn.Linear(width, mixture.dimension)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        inputs = 2 * mixture.dimension + TIME_FEATURES + len(mixture)
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture's exact ε, computed in float64, and √(1 − ᾱ) times the perceptron, which thus vanishes at x_T.

        Both `[N, D, 1, 1]` float32 at states `x [N, D, 1, 1]` and `timestep [N]`.
        """
        alpha_bar = self.alphas[timestep]
        state, noise = x.flatten(1).double(), (1 - alpha_bar).sqrt()[:, None]
        exact = self.mixture.noise_prediction(state, alpha_bar)
        clean = (state - noise * exact) / alpha_bar.sqrt()[:, None]
        phase = timestep[:, None] * torch.arange(1, 1 + TIME_FEATURES) * (math.pi / TRAIN_TIMESTEPS)
        posterior = self.mixture.posterior(state, alpha_bar)
        values = self.layers(torch.cat([state, clean, phase.cos(), posterior], 1).float())
        return exact.float().view_as(x), (noise.float() * values).view_as(x)


class MixtureNetwork(nn.Module):
    """A noise prediction called as `UNet2DConditionModel` is: ``ε(x, t) = ε_mixture(x, ᾱ_t) − √(1 − ᾱ_t) h(x, t)``.

    So the perceptron h is what training adds to the score. Arguments as `Perceptron`'s.
    """

    dtype = torch.float32

    def __init__(self, mixture: GaussianMixture, alphas: Tensor, width: int) -> None:
        super().__init__()
        self.perceptron = Perceptron(mixture, alphas, width)

    def forward(
        self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """ε `[N, D, 1, 1]` float32; the condition does not count."""
        exact, change = self.perceptron(x, timestep)
        return (exact - change,)


class PerceptronFlow(nn.Module):
    """g_φ, called as `fastnabla.models.flow`'s networks are. Arguments as `Perceptron`'s."""

    def __init__(self, mixture: GaussianMixture, alphas: Tensor, width: int) -> None:
        super().__init__()
        self.perceptron = Perceptron(mixture, alphas, width)

    def forward(self, x: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        """g `[N, D, 1, 1]` at states `x [N, D, 1, 1]` and `timestep [N]`; prompts do not count."""
        return self.perceptron(x, timestep)[1]
