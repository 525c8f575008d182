"""Warning about prompts that the text encoder truncates."""

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CHUNK = 1024
"""Prompts tokenized at once; affects memory only."""


def warn_truncated(prompts: Sequence[str], *tokenizers: PreTrainedTokenizerBase) -> None:
    """Log one warning if prompts are longer than a tokenizer's `model_max_length`, with their count and the first of them.

    With several tokenizers, as in SDXL, a prompt counts once if any of them truncates it.
    """
    first, count = None, 0
    for start in range(0, len(prompts), CHUNK):
        part = list(prompts[start : start + CHUNK])
        lengths = [tokenizer(part, truncation=False, verbose=False).input_ids for tokenizer in tokenizers]
        for prompt, tokens in zip(part, zip(*lengths, strict=True), strict=True):
            if any(len(t) > tokenizer.model_max_length for t, tokenizer in zip(tokens, tokenizers, strict=True)):
                first = prompt if first is None else first
                count += 1
    if first is not None:
        logging.getLogger("fastnabla").warning(
            "%d of the run's %d prompts are longer than the %s tokens of the text encoder, which ignores the rest; the first: %r",
            count,
            len(prompts),
            " and ".join(str(limit) for limit in sorted({tokenizer.model_max_length for tokenizer in tokenizers})),
            first if len(first) <= 200 else first[:200] + "…",
        )
