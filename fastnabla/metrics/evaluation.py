"""Measuring a policy on fixed prompts and noise."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnabla.decoder import Decoder
from fastnabla.metrics.diversity import hue_entropy, pairwise_distance
from fastnabla.metrics.prior import frechet_distance
from fastnabla.rewards import RewardSum

LatentSampler = Callable[[Tensor, int], Tensor]
"""Prompt numbers `[N]` and a number that selects the noise → finished latents `[N, C, H, W]`."""


class Evaluator:
    """Rewards, diversity and distance from the prior of samples for the first `prompts`.

    Args:
        sample: the policy's sampler; the same noise number gives the same noise.
        decoder: latents to images.
        reward: whose terms are reported.
        probe: see `fastnabla.metrics.probes`, or None.
        prompts: texts.
        samples: images per prompt.
        chunk: most images scored at once; None for all.
    """

    def __init__(
        self,
        sample: LatentSampler,
        decoder: Decoder,
        reward: RewardSum,
        probe: Any | None,
        prompts: Sequence[str],
        samples: int,
        chunk: int | None = None,
    ) -> None:
        self.chunk = chunk
        self.sample, self.decoder, self.reward, self.probe = sample, decoder, reward, probe
        self.prompt = torch.arange(len(prompts)).repeat_interleave(samples)
        self.prompts = [prompts[i] for i in self.prompt.tolist()]
        self.prior_features: Tensor | None = None

    def images(self, noise: int = 0) -> Tensor:
        """Images `[prompts * samples, 3, H, W]` of the policy as it is, prompt by prompt."""
        return self.decoder.decode(self.sample(self.prompt, noise))

    @torch.no_grad()
    def set_prior(self, images: Tensor) -> None:
        """Take `images`, the pretrained policy's samples from noise of their own, as the prior to keep.

        `measure` reports the Fréchet distance to them; for the pretrained policy itself it is the floor that the
        finite number of samples sets.
        """
        if self.probe is not None:
            self.prior_features = self.probe.features(images)

    @torch.no_grad()
    def measure(self, images: Tensor) -> dict[str, float]:
        """Metrics of `images`, as `images()` returns them, by name."""
        parts = self.reward.parts(images, self.prompts, self.chunk)
        total = self.reward.total(parts)
        metrics = {"reward": total.mean().item(), "reward_std": total.std().item()}
        metrics |= {f"reward_{name}": values.mean().item() for name, values in parts.items()}
        metrics["hue_entropy"] = hue_entropy(images, self.prompt)
        if self.probe is not None:
            features = self.probe.features(images)
            metrics["pairwise_distance"] = pairwise_distance(features, self.prompt)
            if self.prior_features is not None:
                metrics["prior_distance"] = frechet_distance(features, self.prior_features)
            if hasattr(self.probe, "accuracy"):
                metrics["accuracy"] = self.probe.accuracy(images, self.prompts)
        return metrics
