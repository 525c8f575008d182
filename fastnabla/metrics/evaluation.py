"""Evaluation of a policy on fixed prompts and noise."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnabla.distributed.world import ALONE, World
from fastnabla.metrics.diversity import hue_entropy, mean_distance, pairwise_distance
from fastnabla.metrics.joint_entropy import joint_entropy
from fastnabla.metrics.measures import Measures, measure_images, probe_features
from fastnabla.metrics.prior import frechet_distance
from fastnabla.metrics.vendi import mean_vendi_score
from fastnabla.models.decoder import Decoder
from fastnabla.rewards import RewardSum

LatentSampler = Callable[[Tensor, int], Tensor]
"""Numbers of an evaluator's samples `[n]`, and a number that selects the noise → finished latents `[n, C, H, W]`."""


class Evaluator:
    """Measures rewards, diversity and distance from the prior of samples for `prompts`.

    Args:
        sample: the policy's sampler. The same noise number gives the same noise.
        decoder: decodes latents to images.
        reward: the reward, whose terms are reported.
        probe: see `fastnabla.metrics.probes`, or None.
        prompts: texts.
        samples: images per prompt.
        chunk: largest number of images scored at once; None for all.
        world: ranks that share the sampling.
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
        """Numbers of the samples that this rank draws."""
        self.prior_features: Tensor | None = None

    def images(self, noise: int = 0) -> Tensor:
        """Sample images `[prompts * samples, 3, H, W]` from the current policy, ordered by prompt. Every rank gets all."""
        # A rank without samples of its own draws one anyway, because it needs the shape.
        rows = self.rank_rows if len(self.rank_rows) else torch.zeros(1, dtype=torch.int64)
        images = self.decoder.decode(self.sample(rows, noise))
        return self.world.all_gather_rows(images[: len(self.rank_rows)], self.rank_rows, len(self.prompt))

    @torch.no_grad()
    def set_prior(self, images: Tensor) -> None:
        """Set the samples that represent the prior: `images` of the pretrained policy, from separate noise.

        `measure` reports the Fréchet distance to them. For the pretrained policy itself this is the floor set by the finite
        number of samples.
        """
        self.prior_features = probe_features(images, self.probe, self.chunk)

    def measures(self, images: Tensor) -> Measures:
        """Measures of each of `images`, in the order of `images()`."""
        return measure_images(images, self.prompt, self.prompts, self.reward, self.probe, self.chunk)

    def measure(self, images: Tensor) -> dict[str, float]:
        """Metrics of `images`, in the order of `images()`, by name."""
        measures = self.measures(images)
        metrics = summary(measures)
        if self.prior_features is not None:
            metrics["prior_distance"] = frechet_distance(measures.features, self.prior_features)
        return metrics | image_metrics(images, self.prompt, self.prompts, self.probe, self.chunk)


def summary(measures: Measures) -> dict[str, float]:
    """Metrics by name that follow from the measures of each sample."""
    metrics = {"reward": measures.total.mean().item(), "reward_std": measures.total.std().item()}
    metrics |= {f"reward_{name}": values.mean().item() for name, values in measures.parts.items()}
    metrics["hue_entropy"] = hue_entropy(measures.hue, measures.prompt)
    metrics["joint_entropy"] = joint_entropy(measures.hue, measures.dark, measures.prompt)
    metrics["dark_grounds"] = measures.dark.mean().item()
    if measures.features is not None:
        metrics["pairwise_distance"] = pairwise_distance(measures.features, measures.prompt)
        metrics["vendi"] = mean_vendi_score(measures.features, measures.prompt)
    return metrics


@torch.no_grad()
def image_metrics(
    images: Tensor, prompt: Tensor, texts: Sequence[str], probe: Any | None, chunk: int | None = None
) -> dict[str, float]:
    """Metrics by name that the probe computes from the images themselves. A "pairwise_distance" replaces that of features.

    All are means over prompts with equally many samples, so prompts can also be passed one by one.

    Args:
        images: `[N, 3, H, W]` in [0, 1].
        prompt: their prompt numbers `[N]`.
        texts: their N prompts.
        probe: see `fastnabla.metrics.probes`, or None.
        chunk: largest number of pairs of images compared at once; None for all pairs of a prompt.
    """
    metrics = {}
    if hasattr(probe, "distance"):
        metrics["pairwise_distance"] = mean_distance(images, prompt, probe.distance, chunk)
    if hasattr(probe, "accuracy"):
        metrics["accuracy"] = probe.accuracy(images, texts)
    return metrics
