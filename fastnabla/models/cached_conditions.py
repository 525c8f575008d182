"""Conditions for prompt lists too large for the device: it holds the embeddings used last, host memory holds more."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastnabla.models.conditions import Conditions

DEVICE_BYTES = 256 * 2**20
"""Bytes of the tables on the device. In 16 bits these are 2,269 rows for Stable Diffusion 1.5, 844 for XL, 98 for 3 and 3.5,
63 for FLUX. One row is the unconditional embedding, the others are prompts."""

Fetch = Callable[[Sequence[int]], Sequence[tuple[Tensor, ...]]]
"""Maps prompt indices to the embeddings of each, on any device: `[L, D]` and, for most families, pooled `[E]`."""


class CachedConditions(Conditions):
    """Embeddings of P prompts, of which the device holds those used last.

    A call of `ensure` may overwrite rows, or replace the tables by larger ones. Conditions that were looked up before are
    copies, so a graph that holds them stays right, also where its backward pass recomputes the network.

    Args:
        count: P.
        fetch: finds embeddings; called without gradients, with all prompts of a call of `ensure`, so that it knows which were
            used last. A prompt's embeddings must be the same each time, bit for bit.
        unconditional: the embeddings of row 0, `[1, L, D]` and, for most families, pooled `[1, E]`, on the device.
        shared: as for `Conditions`.
        device_bytes: bytes of the tables; exceeded if a single call of `ensure` needs more.
    """

    def __init__(
        self,
        count: int,
        fetch: Fetch,
        unconditional: tuple[Tensor, ...],
        shared: Mapping[str, Tensor],
        device_bytes: int,
    ) -> None:
        rows = max(1, device_bytes // sum(each.nbytes for each in unconditional))
        tables = [_grown(each, rows) for each in unconditional]
        super().__init__(*tables, *[None] * (2 - len(tables)), shared)
        self.fetch = fetch
        # Prompts without a row have an index out of range, so that a look-up fails.
        absent = torch.full((count,), torch.iinfo(torch.int64).max, device=self.device)
        self.register_buffer("row", absent, persistent=False)
        self._row_of: OrderedDict[int, int] = OrderedDict()
        """Row by prompt index, least recently used first."""

    @torch.no_grad()
    def ensure(self, prompt: Tensor) -> None:
        """As `Conditions.ensure`; copies missing embeddings to the device, in place of those not used for longest."""
        wanted = list(dict.fromkeys(prompt.tolist()))
        self._make_room(len(wanted))
        for number in wanted:
            if number in self._row_of:
                self._row_of.move_to_end(number)
        for number, embeddings in zip(wanted, self.fetch(wanted), strict=True):
            if number not in self._row_of:
                row = self._free_row()
                for table, embedding in zip((self.text, self.pooled), embeddings, strict=False):
                    table[row] = embedding
                self.row[number], self._row_of[number] = row, row

    def _make_room(self, prompts: int) -> None:
        """Make the tables large enough for `prompts` at once."""
        for name in ("text", "pooled"):
            table = getattr(self, name)
            if table is not None and len(table) < 1 + prompts:
                setattr(self, name, _grown(table, 1 + prompts))

    def _free_row(self) -> int:
        """A row that no prompt has; if there was none, that of the least recently used prompt."""
        if 1 + len(self._row_of) < len(self.text):
            return 1 + len(self._row_of)
        evicted, row = self._row_of.popitem(last=False)
        self.row[evicted] = torch.iinfo(torch.int64).max
        return row

    def _rows(self, prompt: Tensor) -> Tensor:
        return self.row[prompt]


def _grown(table: Tensor, rows: int) -> Tensor:
    """A copy of `table [n, …]` with `rows` rows, of which those from n on are free."""
    grown = table.new_zeros(rows, *table.shape[1:])
    grown[: len(table)] = table
    return grown
