"""A fresh start in a store that outlives its processes: torchrun's agent leaves those that it restarts the keys of those
before, by which they would look for the dead. (Its restart count does not tell attempts apart: on several nodes it may
differ.)"""

import time
import uuid
from datetime import timedelta

from torch.distributed import Store

PAUSE = 0.02
"""Seconds between two looks into the store."""


def rendezvous(store: Store, rank: int, size: int, limit: timedelta) -> str:
    """A name that all ranks of this attempt get, and none of another one; when all are there.

    Rank 0 chooses it. Another rank says that it has come under a name of its own, and is answered under that name; what an
    earlier attempt has left is answered too, and nobody reads it.

    Raises:
        RuntimeError: not all come within `limit`.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"came/{rank}", own)
        store.wait([f"met/{own}"], limit)
        name = store.get(f"met/{own}").decode()
        store.set(f"there/{name}/{rank}", "")
        return name
    missing, until = set(range(1, size)), time.monotonic() + limit.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"there/{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"came/{other}"]):
                store.set(f"met/{store.get(f'came/{other}').decode()}", own)
        if missing and time.monotonic() > until:
            raise RuntimeError(f"missing are ranks {sorted(missing)}")
        time.sleep(PAUSE)
    return own
