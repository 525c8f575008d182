"""What the training of the testbed's models shares: configuration, resumable stages, latents of tinted silhouettes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastnabla.testbed.silhouettes import load_masks, tint
from fastnabla.utils.progress import TaskProgress
from fastnabla.utils.require import require


@dataclasses.dataclass(kw_only=True, slots=True)
class PretrainConfig:
    """Train one of the testbed's models: about 75 minutes on two CPU cores, or 65 on one for testbed-flow."""

    model: Literal["testbed", "testbed-flow"] = "testbed"
    """testbed: VAE, classifiers, UNet and text model. testbed-flow: transformer and text encoders, on the shipped VAE."""

    output: Path = Path("runs/testbed")
    """Output folder. It also holds the checkpoints from which an interrupted run resumes."""
    vae_steps: int = 2000
    """Optimizer steps of the VAE, 48 images each."""
    classifier_steps: int = 2500
    """Optimizer steps of each classifier, 128 images each."""
    unet_steps: int = 6500
    """Optimizer steps of the UNet and text model, 64 latents each."""
    flow_steps: int = 10_500
    """Optimizer steps of the flow model's transformer and text encoders, 64 latents each."""
    seed: int = 0
    """Seed of all random draws. The draws of a step depend only on the seed and the step."""
    checkpoint_every: int = 250
    """Optimizer steps between checkpoints."""
    copies: int = 6
    """Tinted copies of each silhouette for the UNet or transformer; the classifiers use half as many."""
    limit: int | None = None
    """Largest number of silhouettes per split, for testing the script. None: all."""

    def __post_init__(self) -> None:
        require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "must be at least 1.")


def seeded(*key: int) -> torch.Generator:
    """A generator seeded by the numbers of `key`."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part) % (2**63)
    return torch.Generator().manual_seed(seed)


def run_stage(
    name: str,
    config: PretrainConfig,
    module: nn.Module,
    steps: int,
    learning_rate: float,
    loss_of_step: Callable[[int], Tensor],
    ema: AveragedModel | None = None,
) -> None:
    """Minimise `loss_of_step(step)` over the parameters of `module`, resuming from the stage's checkpoint.

    Raises:
        ValueError: the checkpoint is of other settings.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    state = {"module": module, "optimizer": optimizer, "schedule": schedule} | ({"ema": ema} if ema else {})
    path = config.output / f"{name}.checkpoint"
    settings = {"steps": steps, "seed": config.seed, "copies": config.copies, "limit": config.limit}
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first, theirs = saved.pop("step"), saved.pop("settings", None)
        if theirs != settings:
            raise ValueError(
                f"output = {str(config.output)!r}: {path.name} is of other settings ({theirs}, not {settings}); name another folder."
            )
        for key, part in state.items():
            part.load_state_dict(saved[key])

    with TaskProgress(Console(), name, steps, first) as progress:
        average = None
        for step in range(first, steps):
            loss = loss_of_step(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if ema:
                ema.update_parameters(module)
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            progress.advance(status=f"loss {average:.4f}")
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
                partial = path.with_suffix(".partial")
                torch.save(
                    {"step": step + 1, "settings": settings} | {key: part.state_dict() for key, part in state.items()},
                    partial,
                )
                partial.rename(path)


@torch.no_grad()
def latent_bank(vae: AutoencoderKL, split: str, copies: int, config: PretrainConfig) -> tuple[Tensor, Tensor]:
    """Scaled latents of `copies` tinted versions of every silhouette of `split`, and their labels."""
    masks, labels = (part[: config.limit] for part in load_masks(split))
    generator = seeded(config.seed, 3)
    latents = []
    for _ in range(copies):
        for part in masks.split(100):
            posterior = vae.encode(tint(part, generator) * 2 - 1).latent_dist
            latents.append(posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator))
    return torch.cat(latents) * vae.config.scaling_factor, labels.repeat(copies)
