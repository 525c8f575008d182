"""Agrees on a fresh key prefix in a store that outlives its processes.

When torchrun restarts the ranks, its store keeps the keys of the previous attempt, which new ranks could mistake for live
peers. torchrun's restart count does not identify the attempt, since it may differ between nodes.
"""

import time
import uuid
from datetime import timedelta

from torch.distributed import Store

PAUSE = 0.02
"""Seconds between two polls of the store."""


def rendezvous(store: Store, rank: int, size: int, limit: timedelta) -> str:
    """Wait for all ranks, and return a name that the ranks of this attempt share and no other attempt has.

    Rank 0 chooses the name. Every other rank announces itself under a random key, and rank 0 answers under that key. Rank 0
    also answers announcements left by an earlier attempt; nobody reads those answers.

    Raises:
        RuntimeError: not all ranks arrive within `limit`.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"announced/{rank}", own)
        store.wait([f"answer/{own}"], limit)
        name = store.get(f"answer/{own}").decode()
        store.set(f"joined/{name}/{rank}", "")
        return name
    missing, until = set(range(1, size)), time.monotonic() + limit.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"joined/{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"announced/{other}"]):
                store.set(f"answer/{store.get(f'announced/{other}').decode()}", own)
        if missing and time.monotonic() > until:
            raise RuntimeError(f"missing ranks: {sorted(missing)}")
        time.sleep(PAUSE)
    return own
