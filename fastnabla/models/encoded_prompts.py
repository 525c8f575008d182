"""Prompts that are encoded on first use, and kept in host memory."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

HOST_BYTES = 5 * 2**30
"""Bytes of embeddings that a process keeps in host memory. In 16 bits these are 45,392 prompts for Stable Diffusion 1.5, 16,885
for XL, 1,965 for 3 and 3.5, 1,279 for FLUX. The memory is not pinned: a rollout copies a few hundred MB at most, once, which is
little beside its network passes."""

Encode = Callable[[Sequence[str]], list[tuple[Tensor, ...]]]
"""Maps prompts to the embeddings of each, in host memory: `[L, D]` and, for most families, pooled `[E]`.

A prompt's embeddings must not depend on the prompts encoded with it. A resumed run encodes other groups of prompts, and would
otherwise differ from an uninterrupted one.
"""


class EncodedPrompts:
    """Embeddings by prompt index: those used last are in host memory, others are encoded.

    Args:
        prompts: texts, by index.
        encode: computes embeddings.
        each: bytes of a prompt's embeddings.
        host_bytes: bytes that are kept.
    """

    def __init__(self, prompts: Sequence[str], encode: Encode, each: int, host_bytes: int) -> None:
        self.prompts, self.encode, self.most = prompts, encode, host_bytes // each
        self._kept: OrderedDict[int, tuple[Tensor, ...]] = OrderedDict()
        """Embeddings by prompt index, least recently used first."""

    def __call__(self, numbers: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """The embeddings of the prompts with these indices, which may be more than are kept."""
        missing = [number for number in numbers if number not in self._kept]
        if missing:
            self._kept |= zip(missing, self.encode([self.prompts[number] for number in missing]), strict=True)
        for number in numbers:
            self._kept.move_to_end(number)
        found = [self._kept[number] for number in numbers]
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
        return found
