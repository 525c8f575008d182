"""Measures of each sample by itself. All other metrics are statistics of these."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnabla.distributed.beacon import BEACON
from fastnabla.metrics.diversity import mean_hue
from fastnabla.metrics.ground import is_dark
from fastnabla.metrics.pixels import PixelProbe
from fastnabla.rewards import RewardSum

logger = logging.getLogger("fastnabla")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Measures of N samples, on the CPU; floats are float64."""

    prompt: Tensor
    """Prompt numbers `[N]`."""
    reward: Tensor
    """The reward r that is trained on `[N]`: normalised and clipped, if the run does so."""
    total: Tensor
    """Raw weighted sum of the terms `[N]`."""
    parts: dict[str, Tensor]
    """Raw, unweighted values `[N]` of each term."""
    hue: Tensor
    """Mean hue `[N]`, in turns; nan for an image that is not finite."""
    dark: Tensor
    """1 where the ground is dark, else 0 `[N]`; nan for an image that is not finite."""
    features: Tensor | None = None
    """Features of the probe `[N, D]`, if it has any."""
    pixels: Tensor | None = None
    """Features of `fastnabla.metrics.pixels` `[N, 192]`. No reward has seen them."""

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, rows: Tensor) -> "Measures":
        """The samples with numbers `rows`."""
        return _map(lambda column: column[0][rows], [self])


def concatenate(measures: Sequence[Measures]) -> Measures:
    """Concatenate the samples of `measures`."""
    return _map(torch.cat, measures)


@torch.no_grad()
def measure_images(
    images: Tensor, prompt: Tensor, texts: Sequence[str], reward: RewardSum, probe: Any | None, chunk: int | None = None
) -> Measures:
    """Measure each of the images.

    Args:
        images: `[N, 3, H, W]` in [0, 1].
        prompt: their prompt numbers `[N]`.
        texts: their N prompts.
        reward: the reward.
        probe: see `fastnabla.metrics.probes`, or None.
        chunk: largest number of images per network pass; None for all.
    """
    parts, hue = reward.parts(images, texts, chunk), mean_hue(images)
    return Measures(
        prompt=prompt.cpu(),
        reward=_column(reward.shape(parts)),
        total=_column(reward.total(parts)),
        parts={name: _column(values) for name, values in parts.items()},
        hue=_column(hue),
        dark=_column(torch.where(hue.isfinite(), is_dark(images), math.nan)),
        features=probe_features(images, probe, chunk),
        pixels=_column(PixelProbe().features(images)),
    )


@torch.no_grad()
def probe_features(images: Tensor, probe: Any | None, chunk: int | None = None) -> Tensor | None:
    """The probe's features `[N, D]` of images `[N, 3, H, W]`, on the CPU. None if the probe has no features.

    Logs a warning if features of an image are not finite or all zero, because metrics based on them are nan.
    """
    if not hasattr(probe, "features"):
        return None
    features = torch.cat([_column(_features_of(part, probe)) for part in images.split(chunk or len(images))])
    if bad := int((~has_direction(features)).sum()):
        logger.warning(
            "the probe %s gives features that are not finite or all zero for %d of %d images; metrics that use them are nan",
            name_of(probe),
            bad,
            len(images),
        )
    return features


def _features_of(images: Tensor, probe: Any) -> Tensor:
    BEACON.advance()
    return probe.features(images)


def has_direction(features: Tensor) -> Tensor:
    """Which rows of `features [N, D]` are finite and not all zero, bool `[N]`."""
    return features.isfinite().all(1) & features.any(1)


def name_of(probe: Any) -> str:
    """Module and class name of a probe."""
    return f"{type(probe).__module__}.{type(probe).__qualname__}"


def _column(values: Tensor) -> Tensor:
    return values.double().cpu()


def _map(function: Any, measures: Sequence[Measures]) -> Measures:
    """Apply `function` to every column: it takes the list of that column in all of `measures`."""
    first = measures[0]
    columns: dict[str, Any] = {
        field.name: function([getattr(m, field.name) for m in measures])
        for field in dataclasses.fields(Measures)
        if isinstance(getattr(first, field.name), Tensor)
    }
    columns["parts"] = {name: function([m.parts[name] for m in measures]) for name in first.parts}
    return Measures(**columns)
