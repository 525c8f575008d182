"""The protocol of a study, a TOML file that is written before its runs. `docs/results/comparison.toml` is one.

This module does not import torch.
"""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastnabla.config.methods import METHODS
from fastnabla.config.presets import PRESETS
from fastnabla.utils.require import require

COMPARED = (
    "hue_entropy",
    "joint_entropy",
    "kernel_distance",
    "kernel_distance_pixels",
    "frechet",
    "frechet_within_prompts",
    "accuracy",
)
"""Names of `fastnabla.study.measures.MEASURES` of which more, or less, is better."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How learning rates are compared."""

    seeds: tuple[int, ...]
    """Seeds of the tuning runs."""
    samples: int
    """Samples per prompt of a tuning run."""

    def __post_init__(self) -> None:
        _require_distinct("tuning.seeds", self.seeds)
        require(self.samples >= 2, "tuning.samples", self.samples, "must be at least 2.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """The runs that are compared."""

    seeds: tuple[int, ...]
    """Seeds of the final runs, none of which is a tuning seed."""
    allowed_losses: tuple[float, ...]
    """One setting is chosen for each: the learning rate with the highest reward among those that lose at most this much hue
    entropy, as a share of its ceiling, on average over the tuning seeds."""

    def __post_init__(self) -> None:
        _require_distinct("final.seeds", self.seeds)
        _require_distinct("final.allowed_losses", self.allowed_losses)
        for loss in self.allowed_losses:
            require(0 <= loss <= 1, "final.allowed_losses", loss, "each must be a share between 0 and 1.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """How many samples of a final run are measured."""

    samples: int
    """Samples per prompt at the end of training."""
    reference_samples: int
    """Samples per prompt of the pretrained model, from other noise: the prior in all distances."""
    scales: tuple[float, ...] = ()
    """Factors of the LoRA at inference, besides 0 (the pretrained model) and 1."""
    scale_samples: int = 16
    """Samples per prompt at each of the scales; the same noise at all of them."""
    held_out: str | None = None
    """Source of prompts that no run is trained on, as in prompts.source. None measures none."""
    held_out_samples: int = 8
    """Samples for each of these prompts."""
    divergence_samples: int = 8
    """Trajectories per prompt whose KL from the pretrained model is measured."""

    def __post_init__(self) -> None:
        counts = ("samples", "reference_samples", "scale_samples", "held_out_samples", "divergence_samples")
        for name in counts:
            require(getattr(self, name) >= 2, f"measurement.{name}", getattr(self, name), "must be at least 2.")
        require(
            self.scale_samples <= self.samples,
            "measurement.scale_samples",
            self.scale_samples,
            f"must be at most measurement.samples (= {self.samples}), of which they are the first.",
        )
        _require_distinct("measurement.scales", self.scales)
        for scale in self.scales:
            good = 0 < scale < math.inf and scale != 1
            require(
                good, "measurement.scales", scale, "each must be positive, finite and not 1, which is always measured."
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """The comparisons whose p-values are adjusted together."""

    method: str
    """Name of the method that is compared with every other one."""
    gain: float
    """Gain of the reward at which methods are compared, by scaling the LoRA."""
    measures: tuple[str, ...]
    """Measures that are compared, of `COMPARED`."""
    note: str = ""
    """What the page says about them, such as when they were decided."""

    def __post_init__(self) -> None:
        require(0 < self.gain < math.inf, "claims.gain", self.gain, "must be positive and finite.")
        _require_distinct("claims.measures", self.measures)
        for name in self.measures:
            require(name in COMPARED, "claims.measures", name, f"must be one of {', '.join(COMPARED)}.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A method with its settings, whose learning rate is tuned."""

    name: str
    """Name on the page and in the names of run folders."""
    method: str
    """One of `fastnabla.config.methods.METHODS`."""
    learning_rates: tuple[float, ...]
    """Values of optimizer.learning_rate that are tried. A single one is used as it is."""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Fields of `python -m fastnabla.train PRESET --help` → values, as written there."""
    note: str = ""
    """What the page says about it."""

    @property
    def is_tuned(self) -> bool:
        """Whether there is a choice of learning rates."""
        return len(self.learning_rates) > 1

    def __post_init__(self) -> None:
        where = f"methods: {self.name!r}"
        good = self.name and not set(self.name) - set("abcdefghijklmnopqrstuvwxyz0123456789-")
        require(bool(good), "methods.name", self.name, "use lower-case letters, digits and -; it names folders.")
        require(self.method in METHODS, f"{where}: method", self.method, f"must be one of {', '.join(METHODS)}.")
        _require_distinct(f"{where}: learning_rates", self.learning_rates)
        for rate in self.learning_rates:
            require(0 < rate < math.inf, f"{where}: learning_rates", rate, "each must be positive and finite.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What a study does."""

    preset: str
    """Preset of `python -m fastnabla.train` from which all runs start."""
    passes: float
    """Budget of each run in U."""
    tuning: Tuning
    final: Final
    measurement: Measurement
    claims: Claims
    methods: tuple[Contender, ...]
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Fields of all runs → values."""

    def __post_init__(self) -> None:
        require(self.preset in PRESETS, "preset", self.preset, f"must be one of {', '.join(PRESETS)}.")
        require(0 < self.passes < math.inf, "passes", self.passes, "must be positive and finite.")
        _require_distinct("methods.name", [method.name for method in self.methods])
        names = [method.name for method in self.methods]
        require(self.claims.method in names, "claims.method", self.claims.method, f"must be one of {', '.join(names)}.")
        for settings in (self.settings, *(method.settings for method in self.methods)):
            require(
                settings.get("sampler.scheduler") != "euler",
                "settings.sampler.scheduler",
                "euler",
                "a study measures the KL along trajectories, which needs steps with noise; use ddim.",
            )
        common = set(self.tuning.seeds).intersection(self.final.seeds)
        require(not common, "final.seeds", sorted(common), "are tuning seeds too; the final runs need fresh ones.")

    @classmethod
    def read(cls, path: Path) -> "Protocol":
        """Read a TOML file.

        Raises:
            ValueError: the file cannot be read, a name is unknown or missing, or a value is invalid.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{str(path)!r}: cannot be read as a protocol ({error}).") from error
        try:
            return _build(cls, values, "")
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error


def _build(cls: type, values: Any, where: str) -> Any:
    """An instance of the dataclass `cls` from a table of TOML."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'the file'}: must be a table.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise ValueError(f"{prefix}{name}: there is no such name; the names are {', '.join(fields)}.")
    for name, field in fields.items():
        if field.default is field.default_factory is dataclasses.MISSING and name not in values:
            raise ValueError(f"{prefix}{name}: is missing.")
    return cls(**{name: _value(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` of TOML as the type `hint` of a field."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        require(isinstance(value, list) and bool(value), where, value, "must be a list that is not empty.")
        return tuple(_value(inner[0], each, where) for each in value)
    if origin is not None and issubclass(dict, origin):
        right = isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
        require(right, where, value, 'must be a table of strings: { "FIELD" = "VALUE" }.')
        return value
    kinds = (int, float) if hint is float else tuple(kind for kind in (inner or (hint,)) if kind is not type(None))
    good = isinstance(value, kinds) and not isinstance(value, bool)
    require(good, where, value, f"must be of type {kinds[-1].__name__}.")
    return float(value) if hint is float else value


def _require_distinct(name: str, values: Sequence[Any]) -> None:
    require(len(set(values)) == len(values), name, list(values), "each value may be given only once.")
