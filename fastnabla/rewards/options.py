"""Settings that all network rewards share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import get_args

from fastnabla.config.model_sections import Precision, Preprocess


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RewardOptions:
    """Settings of the network rewards. The testbed's analytic rewards have none.

    Raises:
        ValueError: a value is not one of the choices.
    """

    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Sources of weights, by reward (``hpsv2``) or part of a reward (``hpsv2.tokenizer``). A source is a hub id, a local
    folder or a local file. Other parts come from the published repositories."""
    preprocess: Preprocess = "official"
    """"official": preprocess images as in each scorer's training. "reference": as in the reference implementation of ∇-DB,
    which resizes images for ``aesthetic`` to a square without antialiasing and allows ``imagereward`` longer prompts."""
    checkpoint: bool = False
    """Recompute each transformer layer in the backward pass instead of keeping its activations."""
    precision: Precision | None = None
    """Precision of the forward and the backward pass. "float32". "tf32": float32, but on a GPU the inputs of products are
    rounded to 10 mantissa bits. "bf16": autocast to bfloat16; norms, the residual stream, encoded prompts and the last
    layers stay in float32. None: "tf32" on a GPU, "float32" elsewhere."""
    random_init: bool = False
    """Build the real architectures with random weights and a hashing tokenizer, without any download. For smoke tests and
    memory measurements: the rewards are meaningless."""

    def __post_init__(self) -> None:
        if self.preprocess not in get_args(Preprocess):
            raise ValueError(f"reward.preprocess = {self.preprocess!r}: must be 'official' or 'reference'.")
        if self.precision not in (None, *get_args(Precision)):
            known = ", ".join(map(repr, get_args(Precision)))
            raise ValueError(f"reward.precision = {self.precision!r}: must be one of {known}, or None.")


DEFAULTS = RewardOptions()


def parse_weights(items: Sequence[str]) -> dict[str, str]:
    """Parse items of the form ``name=source`` into a dictionary.

    Raises:
        ValueError: an item has no name or no source, or a name appears twice.
    """
    weights: dict[str, str] = {}
    for item in items:
        name, _, source = item.partition("=")
        if not name or not source:
            raise ValueError(f"reward.weights: {item!r} is not of the form name=source, e.g. hpsv2=models/HPSv2.")
        if name in weights:
            raise ValueError(f"reward.weights: {name!r} appears twice; give it once.")
        weights[name] = source
    return weights
