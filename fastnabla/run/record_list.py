"""The metric records of a run in 8 bytes a number. As dictionaries, they would be most of what grows with the number of updates."""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

EXACT = 2**53
"""Whole numbers up to this size are exact in 8 bytes."""

Form = tuple[str, tuple[tuple[str, bool], ...]]
"""A record's phase, and for each of its metrics the name, and whether it is a whole number."""


class RecordList(Sequence[dict[str, Any]]):
    """Records `{"phase": str, name: int | float | None, …}`, which are read and appended like those of a list. Each is made when it
    is read, so changing it changes nothing here.

    Args:
        records: to begin with.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self._forms: dict[Form, int] = {}
        self._values: list[array[float]] = []
        """By form, the records' numbers one after the other. NaN stands for None."""
        self._places = array("q")
        """Each record's form and number among those of its form, in turn."""
        for record in records:
            self.append(record)

    def __len__(self) -> int:
        return len(self._places) // 2

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._record(list(self._forms), *self._places[2 * index : 2 * index + 2])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._read(range(len(self)))

    def __reversed__(self) -> Iterator[dict[str, Any]]:
        return self._read(reversed(range(len(self))))

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    def append(self, record: dict[str, Any]) -> None:
        """Append a record; whole numbers are at most `EXACT`."""
        metrics = {name: value for name, value in record.items() if name != "phase"}
        form = record["phase"], tuple((name, isinstance(value, int)) for name, value in metrics.items())
        number = self._forms.setdefault(form, len(self._forms))
        if number == len(self._values):
            self._values.append(array("d"))
        values = self._values[number]
        self._places.extend((number, len(values) // len(metrics)))
        values.extend(math.nan if value is None else value for value in metrics.values())

    def of(self, phase: str) -> list[dict[str, Any]]:
        """The records of a phase. Others are not made."""
        forms = list(self._forms)
        places = zip(self._places[::2], self._places[1::2], strict=True)
        return [self._record(forms, number, row) for number, row in places if forms[number][0] == phase]

    def _read(self, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
        forms = list(self._forms)
        return (self._record(forms, *self._places[2 * index : 2 * index + 2]) for index in indices)

    def _record(self, forms: list[Form], number: int, row: int) -> dict[str, Any]:
        phase, names = forms[number]
        values = self._values[number][row * len(names) : (row + 1) * len(names)]
        return {"phase": phase} | {
            name: int(value) if whole else None if math.isnan(value) else value
            for (name, whole), value in zip(names, values, strict=True)
        }
