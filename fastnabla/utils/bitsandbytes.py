"""The check for bitsandbytes, which is imported only where it is used, because it imports torch's compiler."""

import importlib
from types import ModuleType


def require_bitsandbytes(field: str, value: str, on_gpu: bool, otherwise: str) -> ModuleType:
    """The package, imported.

    Args:
        field, value: the setting that needs it.
        on_gpu: whether it is to compute on a GPU.
        otherwise: what to use instead, a sentence.

    Raises:
        ValueError: it is not installed, or is for a GPU and has no library for this torch's CUDA.
    """
    try:
        package = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f"{field} = {value!r}: the package is not installed; run: pip install bitsandbytes. {otherwise}"
        ) from error
    if on_gpu and not package.cextension.lib.compiled_with_cuda:
        raise ValueError(
            f"{field} = {value!r}: bitsandbytes has no library for this torch's CUDA; `python -m bitsandbytes` has details. "
            f"{otherwise}"
        )
    return package
