"""What is measured of a model's samples."""

import dataclasses
from collections.abc import Callable

from fastnabla.metrics.diversity import hue_entropy, hue_entropy_ceiling, pairwise_distance
from fastnabla.metrics.joint_entropy import joint_entropy, joint_entropy_ceiling
from fastnabla.metrics.kernel_distance import kernel_distance
from fastnabla.metrics.prior import mean_within_prompts, sample_frechet_distance
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
    return hue_entropy(seen.hue, seen.prompt) / hue_entropy_ceiling(samples.per_prompt)


def _joint_entropy(samples: Samples, _: Samples) -> float:
    seen = samples.measures
    return joint_entropy(seen.hue, seen.dark, seen.prompt) / joint_entropy_ceiling(samples.per_prompt)


def _pairwise_distance(samples: Samples, _: Samples) -> float | None:
    seen = samples.measures
    return None if seen.features is None else pairwise_distance(seen.features, seen.prompt)


def _kernel_distance(samples: Samples, prior: Samples) -> float | None:
    a, b = samples.measures, prior.measures
    return None if a.features is None else 1000 * kernel_distance(a.features, b.features, a.prompt, b.prompt)


def _kernel_distance_pixels(samples: Samples, prior: Samples) -> float:
    a, b = samples.measures, prior.measures
    return 1000 * kernel_distance(a.pixels, b.pixels, a.prompt, b.prompt)


def _frechet(samples: Samples, prior: Samples) -> float | None:
    a, b = samples.measures.features, prior.measures.features
    return None if a is None else sample_frechet_distance(a, b)


def _frechet_within_prompts(samples: Samples, prior: Samples) -> float | None:
    a, b = samples.measures, prior.measures
    if a.features is None:
        return None
    return mean_within_prompts(sample_frechet_distance, a.features, a.prompt, b.features, b.prompt)


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
