"""Measured samples of a model on disk: what all metrics of a study are computed from."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastnabla.metrics.measures import Measures
from fastnabla.utils.durable import write_file

PART = "part."
FEATURES = ("features", "pixels")
"""Columns that are stored as float32."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Samples of one model, equally many for each prompt and ordered by prompt."""

    measures: Measures
    correct: Tensor | None
    """Whether the probe recognises what the prompt names, 0 or 1 `[N]`, if it can tell."""

    @property
    def per_prompt(self) -> int:
        """Number of samples of each prompt."""
        return len(self.measures) // len(self.measures.prompt.unique())

    def first(self, count: int) -> "Samples":
        """The first `count` samples of each prompt."""
        rows = torch.where(torch.arange(len(self.measures)) % self.per_prompt < count)[0]
        correct = None if self.correct is None else self.correct[rows]
        return Samples(measures=self.measures[rows], correct=correct)


def write_samples(path: Path, samples: Samples, key: dict[str, Any]) -> None:
    """Write `samples` to a safetensors file, atomically.

    Args:
        path: its folder is created.
        samples: what to write.
        key: everything that the samples depend on, as JSON data.
    """
    fields = {field.name: getattr(samples.measures, field.name) for field in dataclasses.fields(Measures)}
    parts = {f"{PART}{name}": values for name, values in fields.pop("parts").items()}
    columns = fields | parts | {"correct": samples.correct}
    tensors = {name: values.contiguous() for name, values in columns.items() if values is not None}
    tensors |= {name: tensors[name].float() for name in FEATURES if name in tensors}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, save(tensors, {"key": json.dumps(key, sort_keys=True)}))


def has_samples(path: Path, key: dict[str, Any]) -> bool:
    """Whether the file exists and was written with this `key`.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return False
    with _opened(path) as file:
        return (file.metadata() or {}).get("key") == json.dumps(key, sort_keys=True)


def read_samples(path: Path, key: dict[str, Any]) -> Samples | None:
    """Read what `write_samples` wrote. None if there is no file, or it was written with another `key`.

    Raises:
        ValueError: the file is damaged.
    """
    if not has_samples(path, key):
        return None
    with _opened(path) as file:
        columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    correct = columns.pop("correct", None)
    parts = {name.removeprefix(PART): columns.pop(name) for name in list(columns) if name.startswith(PART)}
    columns |= {name: columns[name].double() for name in FEATURES if name in columns}
    return Samples(measures=Measures(**columns, parts=parts), correct=correct)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); remove it to measure again.") from error
