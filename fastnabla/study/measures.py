"""What is measured of a model's samples."""

import dataclasses
from collections.abc import Callable

from fastnabla.metrics.diversity import HUE_BINS, hue_entropy, pairwise_distance, uniform_entropy
from fastnabla.metrics.joint_entropy import JOINT_BINS, joint_entropy
from fastnabla.metrics.kernel_distance import kernel_distance
from fastnabla.metrics.prior import frechet_between, mean_frechet_distance
from fastnabla.metrics.tilted import WeightedSamples
from fastnabla.study.samples import Samples


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A number that describes samples."""

    label: str
    """What tables and plots call it."""
    of: Callable[[Samples, Samples], float | None]
    """Samples of the model, samples of the prior → its value; None without the probe's features or accuracy."""
    sign: int = 0
    """1 if higher is better, −1 if lower is better, 0 if neither."""


def measures_of(samples: Samples, prior: Samples) -> dict[str, float]:
    """All available `MEASURES` of `samples`, by name."""
    values = {name: measure.of(samples, prior) for name, measure in MEASURES.items()}
    return {name: value for name, value in values.items() if value is not None}


def _hue_entropy(samples: Samples, _: Samples) -> float:
    seen = samples.measures
    return hue_entropy(seen.hue, seen.prompt) / uniform_entropy(HUE_BINS, samples.per_prompt)


def _joint_entropy(samples: Samples, _: Samples) -> float:
    seen = samples.measures
    return joint_entropy(seen.hue, seen.dark, seen.prompt) / uniform_entropy(JOINT_BINS, samples.per_prompt)


def _pairwise_distance(samples: Samples, _: Samples) -> float | None:
    seen = samples.measures
    return None if seen.features is None else pairwise_distance(seen.features, seen.prompt)


def _kernel_distance(samples: Samples, prior: Samples) -> float | None:
    seen = samples.measures.features
    return None if seen is None else 1000 * kernel_distance(seen, prior.measures.features)


def _kernel_distance_pixels(samples: Samples, prior: Samples) -> float:
    return 1000 * kernel_distance(samples.pixels, prior.pixels)


def _frechet(samples: Samples, prior: Samples) -> float | None:
    if samples.measures.features is None:
        return None
    pooled = (WeightedSamples.tilted(each.measures, 0.0).moments for each in (samples, prior))
    return frechet_between(*pooled)


def _frechet_within_prompts(samples: Samples, prior: Samples) -> float | None:
    a, b = samples.measures, prior.measures
    return None if a.features is None else mean_frechet_distance(a.features, a.prompt, b.features, b.prompt)


def _accuracy(samples: Samples, _: Samples) -> float | None:
    return None if samples.correct is None else samples.correct.mean().item()


MEASURES = {
    "reward": Measure(label="reward", of=lambda samples, _: samples.measures.total.mean().item(), sign=1),
    "hue_entropy": Measure(label="hue entropy, share of its ceiling", of=_hue_entropy, sign=1),
    "joint_entropy": Measure(label="entropy of hue × ground, share of its ceiling", of=_joint_entropy, sign=1),
    "pairwise_distance": Measure(label="pairwise distance", of=_pairwise_distance),
    "kernel_distance": Measure(label="kernel distance × 1000, probe's features", of=_kernel_distance, sign=-1),
    "kernel_distance_pixels": Measure(label="kernel distance × 1000, pixels", of=_kernel_distance_pixels, sign=-1),
    "frechet": Measure(label="Fréchet distance", of=_frechet, sign=-1),
    "frechet_within_prompts": Measure(label="Fréchet distance within prompts", of=_frechet_within_prompts, sign=-1),
    "accuracy": Measure(label="accuracy", of=_accuracy, sign=1),
    "dark_grounds": Measure(label="dark grounds", of=lambda samples, _: samples.measures.dark.mean().item()),
}
"""Name → measure. Entropies are shares of what as many samples with uniform bins have on average. Distances are to samples of
the pretrained model from other noise; no reward has seen the features. A longer pairwise distance is not always better: it
grows where images are damaged."""
