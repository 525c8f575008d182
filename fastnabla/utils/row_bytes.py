"""`LiveBytes` and `MovedBytes` for any number of rows, from one pass over shapes.

A tensor has either rows or a fixed size, so bytes are an affine function of the number of rows. The pass has `ROWS` rows, a prime:
what it divides is proportional to the rows, and nothing else is, unless the prime is a width, a rank or a length of the network.
"""

from typing import NamedTuple

from fastnabla.utils.tensor_bytes import LiveBytes, MovedBytes

ROWS = 1009


class RowBytes(NamedTuple):
    """Bytes as a function of the number of rows."""

    fixed: int
    each: int

    def __call__(self, rows: int) -> int:
        return self.fixed + rows * self.each

    def plus(self, nbytes: int) -> "RowBytes":
        """With `nbytes` more, or fewer, of a tensor in a pass of `ROWS` rows."""
        each, fixed = divmod(nbytes, ROWS)
        return RowBytes(self.fixed + nbytes, self.each) if fixed else RowBytes(self.fixed, self.each + each)


class LiveRowBytes(LiveBytes):
    """Counts memory in use in a pass of `ROWS` rows. `live` is a `RowBytes`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = RowBytes(0, 0)
        self._seen_live = {self.live}

    def peaks(self) -> list[RowBytes]:
        """What is in use at the times that can have the maximum; the number of rows decides which one has it.

        A time is left out if another has at least as many fixed bytes and at least as many for each row.
        """
        found: list[RowBytes] = []
        for live in sorted(self._seen_live, key=lambda live: (live.each, live.fixed), reverse=True):
            if not found or live.fixed > found[-1].fixed:
                found.append(live)
        return found

    def _add(self, nbytes: int) -> None:
        self.live = self.live.plus(nbytes)
        if nbytes > 0:
            self._seen_live.add(self.live)


class MovedRowBytes(MovedBytes):
    """Counts memory traffic of a pass of `ROWS` rows. `total` is a `RowBytes`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = RowBytes(0, 0)

    def _add(self, nbytes: int) -> None:
        self.total = self.total.plus(nbytes)
