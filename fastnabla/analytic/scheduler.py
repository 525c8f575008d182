"""The noise schedule of the analytic testbed, as a diffusers scheduler."""

import torch
from diffusers import DDIMScheduler
from torch import Tensor

TRAIN_TIMESTEPS = 1000
LOG_SNR = (6.0, -5.0)
"""log(ᾱ / (1 − ᾱ)) at the first and at the last timestep: from a noise standard deviation of 0.05 to data with 0.7% of their
variance."""


def alpha_bars() -> Tensor:
    """ᾱ by timestep, `[1000]` float64."""
    return torch.linspace(*LOG_SNR, TRAIN_TIMESTEPS, dtype=torch.float64).sigmoid()


def log_snr_scheduler() -> DDIMScheduler:
    """A scheduler whose steps, however many, all change the signal-to-noise ratio by the same factor.

    So all steps can be tilted equally. A step is tilted only through its noise: the policy's output changes by at most
    (σ²/b) ∇log F. In schedules for images the last steps have almost no noise.
    """
    alphas = alpha_bars()
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    return DDIMScheduler(
        trained_betas=betas.numpy(), clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
