"""Samples of the pretrained model, cached in a file.

Drawing them is most of an evaluation's work, and they are the same for all runs of a model.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

LATENTS = "latents"
BLOCK = 64
"""Samples per prompt between two writes of the file; an interruption loses at most these."""


def reference_latents(
    path: Path, others: Iterable[Path], key: dict[str, Any], count: int, draw: Callable[[range], Tensor]
) -> Tensor:
    """The first `count` finished latents of each prompt, `[P, count, C, H, W]`.

    They are read from `path` or one of `others`, whichever has the most. Missing samples are drawn and written to `path` in
    blocks. Files with another `key` are ignored; `path` is overwritten if its key differs.

    Args:
        path: safetensors file.
        others: files of other runs, which are only read.
        key: everything that the samples depend on, as plain numbers, strings, lists and dictionaries.
        count: samples per prompt.
        draw: sample numbers → latents `[P, n, C, H, W]`. A number must always give the same sample.

    Raises:
        ValueError: a file is damaged.
    """
    written = json.dumps(key, sort_keys=True)
    found = [latents for file in (path, *others) if (latents := _read(file, written)) is not None]
    known = max(found, key=lambda latents: latents.shape[1], default=None)
    have = 0 if known is None else known.shape[1]
    for start in range(have, count, BLOCK):
        drawn = draw(range(start, min(start + BLOCK, count))).cpu()
        known = drawn if known is None else torch.cat([known, drawn], 1)
        partial = path.with_name(path.name + ".partial")
        save_file({LATENTS: known.contiguous()}, partial, metadata={"key": written})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    return known[:, :count]


def _read(path: Path, key: str) -> Tensor | None:
    """The latents in the file `path`. None if the file does not exist or has another key."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(LATENTS) if (file.metadata() or {}).get("key") == key else None
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); remove it to draw the samples again.") from error
