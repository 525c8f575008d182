"""Reads .safetensors files that may be damaged or made to deceive.

The library checks that sizes, shapes and places of the tensors fit each other and the file. It takes the last of two tensors of
one name, where another reader may take the first, and waits for a pipe; both are refused here.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastnabla.utils.typed_json import parse

LFS_POINTER = b"version https://git-lfs"
LARGEST_SIDE = 2**63 - 1
"""torch's sizes are 64-bit integers with a sign; the format's have none."""


def read_header(file: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes of the tensors of `file` by name, and its metadata. The tensors are not read.

    Raises:
        ValueError: it is not a valid .safetensors file.
    """
    try:
        _require_distinct_names(file)
        with safe_open(file, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
        if too_large := [name for name, shape in shapes.items() if max(shape, default=0) > LARGEST_SIDE]:
            raise ValueError(f"the shape of {too_large[0]!r} is too large")
        return shapes, metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(_refusal(file, error)) from error


def read_tensors(file: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of `file` by name, on `device`.

    Raises:
        ValueError: it is not a valid .safetensors file.
    """
    read_header(file)
    return load_file(file, device=str(device))


def _require_distinct_names(file: Path) -> None:
    if file.exists() and not file.is_file():
        raise ValueError("not a regular file")
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size <= file.stat().st_size:  # otherwise the library refuses it
            header = opened.read(size)
            if header.startswith(b"{"):
                parse(header.decode())


def _refusal(file: Path, error: Exception) -> str:
    if not file.is_file():
        return f"{str(file)!r} cannot be read as a .safetensors file ({error})."
    with file.open("rb") as opened:
        is_pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
    remedy = (
        "It is a Git LFS pointer; run: git lfs pull" if is_pointer else "Download it again, or restore it from a copy."
    )
    why = " ".join(str(error).split())
    return f"{str(file)!r}, of {file.stat().st_size} bytes, is not a valid .safetensors file ({why:.300}). {remedy}"
