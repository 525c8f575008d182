"""The `TransitionTable` of a scheduler, kept for the next call."""

import threading
import weakref
from typing import Any

from torch import Tensor

from fastnabla.transition import TransitionTable

_TABLES: weakref.WeakKeyDictionary[Any, tuple[list[Any], tuple[Any, ...], TransitionTable]] = (
    weakref.WeakKeyDictionary()
)
"""By scheduler: the parts of it that its table was made of, whose identity they keep by being here; settings; the table."""
_LOCK = threading.Lock()


def table_of(scheduler: Any, eta: float) -> TransitionTable:
    """`TransitionTable.from_scheduler(scheduler, eta=eta)`, made again only when η, the scheduler's timesteps or its
    configuration have changed. One table a scheduler is kept, as long as that lives. A look-up reads no tensor, and so waits
    for no device.

    Raises:
        ValueError: as `from_scheduler`.
    """
    parts = [getattr(scheduler, name, None) for name in ("config", "timesteps", "alphas_cumprod")]
    versions = [part._version for part in parts if isinstance(part, Tensor) and not part.is_inference()]
    settings = (eta, getattr(scheduler, "num_inference_steps", None), versions)
    with _LOCK:
        try:
            kept = _TABLES.get(scheduler)
        except TypeError:  # no scheduler at all, which `from_scheduler` says
            kept = None
        if kept is None or kept[1] != settings or any(a is not b for a, b in zip(kept[0], parts, strict=True)):
            kept = (parts, settings, TransitionTable.from_scheduler(scheduler, eta=eta))
            _TABLES[scheduler] = kept
        return kept[2]
