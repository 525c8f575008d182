"""Samples of the pretrained model, cached in a file.

Drawing them is most of an evaluation's work, and they are the same for all runs of a model.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger("fastnabla")

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
        ValueError: the file at `path` is damaged, or cannot be read or written. Those of other runs that cannot be read are left
            out, with a warning.
    """
    written = json.dumps(key, sort_keys=True)
    counts = {path: _count(path, written)}
    for file in others:
        try:
            counts.setdefault(file, _count(file, written))
        except ValueError as error:
            logger.warning("%s", error)
    longest = max(counts, key=counts.__getitem__)
    known = _read(longest, min(count, counts[longest])) if counts[longest] else None
    have = 0 if known is None else known.shape[1]
    for start in range(have, count, BLOCK):
        drawn = draw(range(start, min(start + BLOCK, count))).cpu()
        known = drawn if known is None else torch.cat([known, drawn], 1)
        _write(path, known, written)
    return known


def weight_files(model: str) -> dict[str, list[int]]:
    """Sizes and times of change of the weights of a model on disk, by file: another model may take its place. Empty for a name."""
    path = Path(model).expanduser()
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    states = {str(file.relative_to(path)): file.stat() for file in files}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def _write(path: Path, latents: Tensor, key: str) -> None:
    """Write the file atomically, whatever other processes write there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({LATENTS: latents.contiguous()}, partial, metadata={"key": key})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} cannot be written ({error}).") from error
    finally:
        partial.unlink(missing_ok=True)


def _count(path: Path, key: str) -> int:
    """Samples per prompt in the file `path`: 0 if it does not exist or has another key.

    Raises:
        ValueError: the file is damaged, or cannot be read.
    """
    try:
        if not path.is_file():
            return 0
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get("key") == key
            return file.get_slice(LATENTS).get_shape()[1] if same else 0
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); remove it to draw the samples again.") from error


def _read(path: Path, count: int) -> Tensor:
    """The first `count` latents of each prompt in the file `path`."""
    with safe_open(path, "pt") as file:
        return file.get_slice(LATENTS)[:, :count]
