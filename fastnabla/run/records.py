"""A run's metrics in memory: one record per update or evaluation. Ranks other than 0 keep only these."""

import itertools
import math
from typing import Any

from fastnabla.run.record_list import RecordList


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with None in place of numbers that are not finite, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


class Records:
    """Metric records, in the order of `log`."""

    def __init__(self) -> None:
        self.records = RecordList()

    def has(self, phase: str, update: int) -> bool:
        """Whether there is a record of this phase and update."""
        return any(record["update"] == update for record in self.records.of(phase))

    def last_in_a_row(self, name: str) -> int:
        """Number of training records at the end, in a row, in which the metric `name` is not 0."""
        backwards = (record.get(name, 0) for record in reversed(self.records) if record["phase"] == "train")
        return sum(1 for _ in itertools.takewhile(bool, backwards))

    def log(self, phase: str, update: int, metrics: dict[str, float], measured: dict[str, float] | None = None) -> None:
        """Append a record.

        Args:
            phase: "train" or "evaluate".
            update: number of updates done.
            metrics: values by name that the seed determines. Those that are not finite are recorded as None.
            measured: values that the seed does not determine, e.g. a reading of `GpuMeter`. Not kept here.
        """
        self.records.append(finite({"phase": phase, "update": update, **metrics}))

    def measure(self, phase: str, update: int, measured: dict[str, float]) -> None:
        """Append measured values of a phase. Not kept here."""

    def flush(self) -> None:
        """Flush the records to the disk."""

    def close(self) -> None:
        """Close all files."""
