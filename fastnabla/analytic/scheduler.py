"""The noise schedules of the analytic testbed, as diffusers schedulers."""

from typing import Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fastnabla.analytic.config import ScheduleName

TRAIN_TIMESTEPS = 1000
LOG_SNR = (6.0, -5.0)
"""log(ᾱ / (1 − ᾱ)) at the first and at the last timestep of "log-snr": from a noise standard deviation of 0.05 to data with
0.7% of their variance."""
BETAS = (0.00085, 0.012)
"""First and last β of "stable-diffusion"."""
SPACINGS: dict[ScheduleName, str] = {"log-snr": "trailing", "stable-diffusion": "leading"}
"""Spacing of the timesteps, by schedule."""


def alpha_bars(schedule: ScheduleName = "log-snr") -> Tensor:
    """ᾱ by timestep, `[1000]` float64."""
    if schedule == "log-snr":
        return torch.linspace(*LOG_SNR, TRAIN_TIMESTEPS, dtype=torch.float64).sigmoid()
    first, last = BETAS
    betas = torch.linspace(first**0.5, last**0.5, TRAIN_TIMESTEPS, dtype=torch.float64).square()
    return (1 - betas).cumprod(0)


def noise_scheduler(
    schedule: ScheduleName = "log-snr", spacing: Literal["leading", "trailing"] | None = None
) -> DDIMScheduler:
    """The scheduler of a noise schedule; `spacing` None is the schedule's own.

    The "trailing" steps of "log-snr", however many, all change the signal-to-noise ratio by the same factor. So all steps can
    be tilted equally. A step is tilted only through its noise: the policy's output changes by at most (σ²/b) ∇log F. In
    "stable-diffusion" the last steps have almost no noise.
    """
    alphas = alpha_bars(schedule)
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    return DDIMScheduler(
        trained_betas=betas.numpy(),
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # for "leading", whose last step would otherwise start at timestep 0
        timestep_spacing=spacing or SPACINGS[schedule],
    )
