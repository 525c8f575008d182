"""Conditions of more prompts than are encoded up front: each is encoded when it is first needed, and kept for a while."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnabla.models.conditions import Conditions

CAPACITY = 1024
"""Prompts kept: 121 MB of Stable Diffusion 1.5's embeddings in 16 bits, 325 MB of XL's."""

Encode = Callable[[Sequence[str]], list[tuple[Tensor, ...]]]
"""Prompts to the embeddings of each, `[1, L, D]` and, for Stable Diffusion XL, pooled `[1, E]`. A prompt's must not depend on
those that it is encoded with, or a resumed run, which has other ones to encode, would not equal an uninterrupted one."""


class PromptCache(Conditions):
    """The embeddings of the prompts that were needed last.

    Args:
        prompts: texts of the prompt numbers.
        encode: what makes them; called without gradients.
        unconditional: the embeddings of row 0, as `encode` gives them.
        time_ids: as for `Conditions`.
        capacity: prompts kept, or as many as are needed at once if those are more.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encode: Encode,
        unconditional: tuple[Tensor, ...],
        time_ids: Tensor | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        tables = [row.new_zeros(1, *row.shape[1:]).copy_(row) for row in unconditional]
        super().__init__(*tables, *[None] * (2 - len(tables)), time_ids)
        self.prompts, self.encode, self.capacity = prompts, encode, capacity
        absent = torch.full((len(prompts),), torch.iinfo(torch.int64).max, device=self.device)
        self.register_buffer(
            "row", absent, persistent=False
        )  # out of range: asking for one that is not there is an error
        self._row_of: OrderedDict[int, int] = OrderedDict()
        """Rows by prompt number, the one that was needed longest ago first."""

    @torch.no_grad()
    def ensure(self, prompt: Tensor) -> None:
        """As `Conditions`; encodes those that are not there, in place of those needed longest ago."""
        wanted = dict.fromkeys(prompt.tolist())
        missing = [number for number in wanted if number not in self._row_of]
        for number in wanted.keys() - missing:
            self._row_of.move_to_end(number)
        if not missing:
            return
        self._grow(len(self._row_of) + len(missing), len(wanted))
        for number, embeddings in zip(missing, self.encode([self.prompts[i] for i in missing]), strict=True):
            row = 1 + len(self._row_of)
            if row == len(self.text):
                gone, row = self._row_of.popitem(last=False)
                self.row[gone] = torch.iinfo(torch.int64).max
            for table, embedding in zip((self.text, self.pooled), embeddings, strict=False):
                table[row] = embedding[0]
            self.row[number], self._row_of[number] = row, row

    def _grow(self, prompts: int, at_once: int) -> None:
        """Have rows for `prompts`, of which not more than are allowed are kept."""
        rows = 1 + max(min(prompts, self.capacity), at_once)
        for name in ("text", "pooled"):
            table = getattr(self, name)
            if table is not None and rows > len(table):
                setattr(self, name, torch.cat([table, table.new_zeros(rows - len(table), *table.shape[1:])]))

    def _rows(self, prompt: Tensor) -> Tensor:
        return self.row[prompt]
