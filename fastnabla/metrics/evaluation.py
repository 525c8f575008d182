"""Measuring a policy on fixed prompts and noise."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnabla.distributed.world import ALONE, World
from fastnabla.metrics.diversity import hue_entropy, mean_distance, pairwise_distance
from fastnabla.metrics.measures import Measures, measure_images, probe_features
from fastnabla.metrics.prior import frechet_distance
from fastnabla.metrics.vendi import mean_vendi_score
from fastnabla.models.decoder import Decoder
from fastnabla.rewards import RewardSum

LatentSampler = Callable[[Tensor, int], Tensor]
"""Which of an evaluator's samples `[n]`, and a number that selects the noise → finished latents `[n, C, H, W]`."""


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
        world: the ranks, each of which samples its rows.
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
        world: World = ALONE,
    ) -> None:
        self.chunk, self.world = chunk, world
        self.sample, self.decoder, self.reward, self.probe = sample, decoder, reward, probe
        self.prompt = torch.arange(len(prompts)).repeat_interleave(samples)
        self.prompts = [prompts[i] for i in self.prompt.tolist()]
        self.rank_rows = world.rank_rows(len(self.prompt))
        """Samples that are this rank's."""
        self.prior_features: Tensor | None = None

    def images(self, noise: int = 0) -> Tensor:
        """Images `[prompts * samples, 3, H, W]` of the policy as it is, prompt by prompt; on every rank all of them."""
        # A rank without rows samples one, whose images give the others' shape, and drops it.
        rows = self.rank_rows if len(self.rank_rows) else torch.zeros(1, dtype=torch.int64)
        images = self.decoder.decode(self.sample(rows, noise))
        return self.world.all_gather_rows(images[: len(self.rank_rows)], self.rank_rows, len(self.prompt))

    @torch.no_grad()
    def set_prior(self, images: Tensor) -> None:
        """Take `images`, the pretrained policy's samples from noise of their own, as the prior to keep.

        `measure` reports the Fréchet distance to them; for the pretrained policy itself it is the floor that the
        finite number of samples sets.
        """
        self.prior_features = probe_features(images, self.probe, self.chunk)

    def measures(self, images: Tensor) -> Measures:
        """What is seen of each of `images`, as `images()` returns them."""
        return measure_images(images, self.prompt, self.prompts, self.reward, self.probe, self.chunk)

    def measure(self, images: Tensor) -> dict[str, float]:
        """Metrics of `images`, as `images()` returns them, by name."""
        return self.summary(images, self.measures(images))

    @torch.no_grad()
    def summary(self, images: Tensor, measures: Measures) -> dict[str, float]:
        """Metrics of `images` by name, given their `measures`."""
        metrics = {"reward": measures.total.mean().item(), "reward_std": measures.total.std().item()}
        metrics |= {f"reward_{name}": values.mean().item() for name, values in measures.parts.items()}
        metrics["hue_entropy"] = hue_entropy(measures.hue, self.prompt)
        metrics["dark_grounds"] = measures.dark.mean().item()
        if hasattr(self.probe, "distance"):
            metrics["pairwise_distance"] = mean_distance(images, self.prompt, self.probe.distance, self.chunk)
        elif measures.features is not None:
            metrics["pairwise_distance"] = pairwise_distance(measures.features, self.prompt)
        if measures.features is not None:
            metrics["vendi"] = mean_vendi_score(measures.features, self.prompt)
        if self.prior_features is not None:
            metrics["prior_distance"] = frechet_distance(measures.features, self.prior_features)
        if hasattr(self.probe, "accuracy"):
            metrics["accuracy"] = self.probe.accuracy(images, self.prompts)
        return metrics
