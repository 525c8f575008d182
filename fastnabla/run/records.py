"""A run's metrics in memory, one record an update or evaluation. The ranks that write nothing have these alone."""

import math
from typing import Any


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """`record` as JSON can have it: None for numbers that are not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


class Records:
    """Metric records, in the order of `log`."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def has(self, phase: str, update: int) -> bool:
        """Whether there is such a record."""
        return any((record["phase"], record["update"]) == (phase, update) for record in reversed(self.records))

    def last_in_a_row(self, name: str) -> int:
        """How many of the last training records have the metric `name` not 0."""
        values = [record.get(name, 0) for record in self.records if record["phase"] == "train"]
        return next((i for i, value in enumerate(reversed(values)) if not value), len(values))

    def log(self, phase: str, update: int, metrics: dict[str, float], measured: dict[str, float] | None = None) -> None:
        """Append a record, e.g. of phase "train", after `update` updates.

        Args:
            phase, update: what the record is of.
            metrics: what the seed determines, by name. Those that are not finite are recorded as None.
            measured: what it does not, e.g. a reading of `GpuMeter`; not kept here.
        """
        self.records.append(finite({"phase": phase, "update": update, **metrics}))

    def measure(self, phase: str, update: int, measured: dict[str, float]) -> None:
        """What was measured of a phase; not kept here."""

    def flush(self) -> None:
        """Flush to the disk what is there."""

    def close(self) -> None:
        """Close what is open."""
