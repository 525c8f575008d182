"""What ends all processes of a run when one of them fails, so that none waits for it for ever.

A process that fails says so in the store by which the processes have met; one that is killed, or whose machine is gone,
cannot, but its heartbeat stops. Each process looks for the first, and after its neighbour's heartbeat, in a thread of its
own: the main one may be within a collective operation that nobody will ever complete. It is ended there.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from torch.distributed import Store

INTERVAL = 1.0
"""Seconds between heartbeats."""
SILENCE = 30.0
"""Seconds without one after which a process counts as dead."""
LINGER = 2.5
"""Seconds that a failed process stays, for the others to learn of it: the store may end with it. They stay longer, so
that a launcher, which looks for the first to end, names the one that failed."""
STATUS = 1


class Watchdog(threading.Thread):
    """Watches the other processes, and tells them what happens to this one.

    Args:
        store: a connection of its own to where all have met.
        rank: of this process.
        size: how many there are.
        speaks: whether it says what ended it, if that was another one.
    """

    def __init__(self, store: Store, rank: int, size: int, speaks: bool) -> None:
        super().__init__(name="watch", daemon=True)
        self.store, self.rank, self.size, self.speaks = store, rank, size, speaks
        self.failed = False
        """Whether this process has failed."""
        self._done = threading.Event()

    def run(self) -> None:
        """Until `done`, or until this process is ended."""
        neighbour = (self.rank + 1) % self.size
        beats, seen, since = 0, b"", time.monotonic()
        while not self._done.wait(INTERVAL):
            beats += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beats))
                failure = json.loads(self.store.get("failure")) if self.store.check(["failure"]) else None
                beat = self.store.get(f"beat/{neighbour}") if self.store.check([f"beat/{neighbour}"]) else b""
            except RuntimeError as error:
                failure, beat = {"rank": None, "what": f"the process that all have met at is gone ({error})"}, b""
            if failure is not None and not self.failed:
                self._follow(failure)
            if beat != seen or beat == b"done":
                seen, since = beat, time.monotonic()
            elif time.monotonic() - since > SILENCE and self.is_first():
                self.tell(f"no sign of life for {SILENCE:.0f} s", neighbour)

    def silent(self, seconds: float) -> list[int]:
        """Ranks from which there is no heartbeat for `seconds` from now on."""

        def beats() -> dict[int, bytes]:
            names = {rank: f"beat/{rank}" for rank in range(self.size)}
            return {rank: self.store.get(name) for rank, name in names.items() if self.store.check([name])}

        try:
            before = beats()
            time.sleep(seconds)
            after = beats()
        except RuntimeError:
            return []
        return [rank for rank, beat in after.items() if beat == before.get(rank) != b"done"]

    def is_first(self) -> bool:
        """Claim to be the first to tell of a failure; whether that is so. Only then it is to be told."""
        try:
            return self.store.add("failures", 1) == 1
        except RuntimeError:  # nobody is told any more
            return True

    def tell(self, what: str, rank: int | None = None) -> None:
        """Tell all others that this process, or that of `rank`, has failed."""
        failure = {"rank": self.rank if rank is None else rank, "what": what}
        if rank is None:
            failure["host"] = socket.gethostname()
        with contextlib.suppress(RuntimeError):
            self.store.set("failure", json.dumps(failure))

    def done(self) -> None:
        """All is well, and no more heartbeats come from here."""
        self._done.set()
        self.join()
        self.store.set(f"beat/{self.rank}", "done")

    def leave(self, status: int) -> NoReturn:
        """End this process, which has failed; the others follow."""
        time.sleep(LINGER)
        _end(status)

    def _follow(self, failure: dict[str, Any]) -> NoReturn:
        who = "" if failure["rank"] is None else f"rank {failure['rank']}"
        who += f" on {failure['host']}" if "host" in failure else ""
        if self.speaks:
            print(f"error: {who}{': ' if who else ''}{failure['what']}; so all processes end.", file=sys.stderr)
        time.sleep(2 * LINGER)
        _end(STATUS)


def _end(status: int) -> NoReturn:
    """Whatever any thread waits for. What is written of a run is whole or not there (`fastnabla.utils.durable`)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
