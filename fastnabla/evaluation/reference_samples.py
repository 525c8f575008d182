"""Samples of the pretrained model, kept in a file: most of an evaluation's work, and the same for all runs of a model."""

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
BLOCK = 64  # samples of each prompt that are drawn before all are written: what an interruption loses


def reference_latents(
    path: Path, others: Iterable[Path], key: dict[str, Any], count: int, draw: Callable[[range], Tensor]
) -> Tensor:
    """The first `count` finished latents of each prompt, `[P, count, C, H, W]`.

    They are read from `path` or one of `others`, whichever has most; what is missing is drawn, and all is written to `path`
    as it comes. Files of another `key` are not used, and `path` is overwritten if it is one.

    Args:
        path: safetensors file.
        others: files of other runs, which are only read.
        key: what the samples depend on; plain numbers, strings, lists and dictionaries.
        count: samples of each prompt.
        draw: numbers of samples → latents `[P, n, C, H, W]`; a number always gives the same sample.

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
    """The latents in the file `path`, if it is there and of that key."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(LATENTS) if (file.metadata() or {}).get("key") == key else None
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); remove it, and it will be made again.") from error
