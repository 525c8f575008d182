"""Ends all processes of a run when one of them fails, because the others would wait for it forever.

A failing process reports the failure in the rendezvous store. A process that is killed, or whose machine is lost, cannot
report anything, but its heartbeat stops. A thread of every process polls for reported failures and for its neighbour's
heartbeat, because the main thread may be blocked in a collective operation that will never complete. The thread then ends
the process.
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
"""Seconds without a heartbeat after which a process counts as dead."""
LINGER = 2.5
"""Seconds that a failed process stays alive, so that the others learn of the failure even if the store ends with this process.
The others stay twice as long, because the launcher blames the first process to exit."""
STATUS = 1


class Watchdog(threading.Thread):
    """Watches the other processes and reports this one's failure to them.

    Args:
        store: a separate connection to the rendezvous store.
        rank: this process's rank.
        size: number of ranks.
        prints: whether to print another rank's failure before this process ends.
    """

    def __init__(self, store: Store, rank: int, size: int, prints: bool) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.store, self.rank, self.size, self.prints = store, rank, size, prints
        self.failed = False
        """Whether this process has failed."""
        self._done = threading.Event()

    def run(self) -> None:
        """Watch until `stop` is called or this process is ended."""
        neighbour = (self.rank + 1) % self.size
        beats, seen, since = 0, b"", time.monotonic()
        while not self._done.wait(INTERVAL):
            beats += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beats))
                failure = json.loads(self.store.get("failure")) if self.store.check(["failure"]) else None
                beat = self.store.get(f"beat/{neighbour}") if self.store.check([f"beat/{neighbour}"]) else b""
            except RuntimeError as error:
                failure, beat = {"rank": None, "what": f"the rendezvous store is gone ({error})"}, b""
            if failure is not None and not self.failed:
                self._exit_after(failure)
            if beat != seen or beat == b"done":
                seen, since = beat, time.monotonic()
            elif time.monotonic() - since > SILENCE and self.claim_first_failure():
                self.report(f"no heartbeat for {SILENCE:.0f} s", neighbour)

    def silent_ranks(self, seconds: float) -> list[int]:
        """Ranks that send no heartbeat during the next `seconds`."""

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

    def claim_first_failure(self) -> bool:
        """Whether no other rank has claimed a failure before. Only the first rank shows and reports its failure."""
        try:
            return self.store.add("failures", 1) == 1
        except RuntimeError:  # the store is gone, so nobody else can report
            return True

    def report(self, what: str, rank: int | None = None) -> None:
        """Report to all other ranks that this rank, or `rank`, has failed."""
        failure = {"rank": self.rank if rank is None else rank, "what": what}
        if rank is None:
            failure["host"] = socket.gethostname()
        with contextlib.suppress(RuntimeError):
            self.store.set("failure", json.dumps(failure))

    def stop(self) -> None:
        """Stop watching after a successful run; the others no longer expect heartbeats from this rank."""
        self._done.set()
        self.join()
        self.store.set(f"beat/{self.rank}", "done")

    def exit(self, status: int) -> NoReturn:
        """End this process after its failure; the others follow."""
        time.sleep(LINGER)
        _end_process(status)

    def _exit_after(self, failure: dict[str, Any]) -> NoReturn:
        who = "" if failure["rank"] is None else f"rank {failure['rank']}"
        who += f" on {failure['host']}" if "host" in failure else ""
        if self.prints:
            print(f"error: {who}{': ' if who else ''}{failure['what']}; all processes end.", file=sys.stderr)
        time.sleep(2 * LINGER)
        _end_process(STATUS)


def _end_process(status: int) -> NoReturn:
    """End the process, whatever its threads are blocked on. A run's files are never half-written
    (`fastnabla.utils.durable`)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
