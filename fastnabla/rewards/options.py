"""How rewards are built: the settings that all of them share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import get_args

from fastnabla.config.model_sections import Precision, Preprocess


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RewardOptions:
    """Settings of the network rewards; the analytic ones of the testbed need none.

    Raises:
        ValueError: a value is not among those allowed.
    """

    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Where weights are, by reward (``hpsv2``) or part of one (``hpsv2.tokenizer``): a hub id, or a local folder or
    file. What is not named comes from the published repository."""
    preprocess: Preprocess = "official"
    """"official": resize and crop images as each scorer was trained with. "reference": as the authors of ∇-DB do, which
    differs for ``aesthetic`` (no antialias, squashed instead of cropped) and in ``imagereward``'s longest prompt."""
    checkpoint: bool = False
    """Recompute each transformer layer in the backward pass instead of keeping its activations."""
    precision: Precision | None = None
    """What the networks compute in, in both passes. "float32". "tf32": float32 whose products are of inputs rounded to 10 bits
    of mantissa, on GPUs; float32 elsewhere. "bf16": autocast to bfloat16; norms, the residual stream, prompts that are encoded
    once and the last layers stay float32. None: "tf32" on a GPU, "float32" elsewhere."""
    random_init: bool = False
    """Build the real architectures with random weights and a stand-in tokenizer: for smoke tests and measuring memory
    without any download. The rewards mean nothing."""

    def __post_init__(self) -> None:
        if self.preprocess not in ("official", "reference"):
            raise ValueError(f"reward.preprocess = {self.preprocess!r}: must be 'official' or 'reference'.")
        if self.precision not in (None, *get_args(Precision)):
            known = ", ".join(map(repr, get_args(Precision)))
            raise ValueError(f"reward.precision = {self.precision!r}: must be one of {known}, or None.")


DEFAULTS = RewardOptions()


def parse_weights(items: Sequence[str]) -> dict[str, str]:
    """Items ``name=source`` as a dictionary.

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
