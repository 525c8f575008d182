"""Ends all processes of a run when one of them fails, because the others would wait for it forever.

A failing process reports the failure in the rendezvous store. A process that is killed, or whose machine is lost, cannot
report anything, but its heartbeat stops. A thread of every process polls for reported failures and for its neighbour's
heartbeat, because the main thread may be blocked in a collective operation that will never complete. The thread then ends
the process.

The thread also finds that its own main thread hangs (`fastnabla.distributed.hang`). If a C function hangs while holding the
GIL, this thread cannot run either: its heartbeat stops, and `fastnabla.utils.last_resort` ends the process.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from torch.distributed import Store

from fastnabla.distributed.beacon import BEACON, Beacon
from fastnabla.distributed.hang import HangLimit, main_thread_place
from fastnabla.utils.last_resort import arm, disarm
from fastnabla.utils.time_limit import print_tracebacks

INTERVAL = 1.0
"""Seconds between heartbeats."""
SILENCE = 30.0
"""Seconds without a heartbeat after which a process counts as dead."""
DONE = "done"
"""The heartbeat of a process whose run has succeeded."""
LINGER = 2.5
"""Seconds that a failed process stays alive, so that the others learn of the failure even if the store ends with this process.
The others stay twice as long, because the launcher blames the first process to exit."""
STATUS = 1


class Watchdog(threading.Thread):
    """Watches the other processes and this one's main thread, and reports this process's failure to the others.

    Args:
        store: a separate connection to the rendezvous store.
        rank: this process's rank.
        size: number of ranks.
        prints: whether to print another rank's failure before this process ends.
        beacon: shows the main thread's progress.
    """

    def __init__(self, store: Store, rank: int, size: int, prints: bool, beacon: Beacon = BEACON) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.store, self.rank, self.size, self.prints, self.beacon = store, rank, size, prints, beacon
        self.failed = False
        """Whether this process has failed."""
        self.ending = False
        """Whether another process has failed, and this one is about to be ended."""
        self._hang: HangLimit | None = None
        self._done = threading.Event()
        self._set("host", socket.gethostname())

    def start(self) -> None:
        """Start to watch."""
        arm(self, SILENCE + LINGER)  # already: the main thread may take the GIL before `run` begins
        super().start()

    def run(self) -> None:
        """Watch until `stop` is called or this process is ended."""
        neighbour = (self.rank + 1) % self.size
        beats, seen, since = 0, "", time.monotonic()
        while not self._done.wait(INTERVAL):
            arm(self, SILENCE + LINGER)
            beats += 1
            try:
                self._set("beat", f"{beats} {self.beacon.collectives}")
                failure = json.loads(self.store.get("failure")) if self.store.check(["failure"]) else None
                beat = self._get("beat", neighbour)
                self._end_if_hung()
            except RuntimeError as error:
                failure, beat = {"rank": None, "what": f"the rendezvous store is gone ({error})"}, ""
            if failure is not None and not self.failed:
                self._exit_after(failure)
            if beat != seen or beat == DONE:
                seen, since = beat, time.monotonic()
            elif time.monotonic() - since > SILENCE and self.claim_first_failure():
                self.report(f"no heartbeat for {SILENCE:.0f} s", neighbour)

    @contextlib.contextmanager
    def hang_limit(self, seconds: float | None) -> Iterator[None]:
        """Within the context, end all processes if this one's main thread makes no progress for `seconds`; None for no limit."""
        self._hang = None if seconds is None else HangLimit(seconds, self.beacon)
        try:
            yield
        finally:
            self._hang = None

    def silent_ranks(self, seconds: float) -> list[int]:
        """Ranks that send no heartbeat during the next `seconds`."""
        try:
            before = self._beats()
            time.sleep(seconds)
            after = self._beats()
        except RuntimeError:
            return []
        return [rank for rank, beat in after.items() if beat == before[rank] and beat not in ("", DONE)]

    def claim_first_failure(self) -> bool:
        """Whether no other rank has claimed a failure before. Only the first rank shows and reports its failure."""
        try:
            return self.store.add("failures", 1) == 1
        except RuntimeError:  # the store is gone, so nobody else can report
            return True

    def report(self, what: str, rank: int | None = None) -> None:
        """Report to all other ranks that this rank, or `rank`, has failed."""
        rank = self.rank if rank is None else rank
        with contextlib.suppress(RuntimeError):
            failure = {"rank": rank, "host": self._get("host", rank), "what": what}
            self.store.set("failure", json.dumps(failure))

    def stop(self) -> None:
        """Stop watching after a successful run; the others no longer expect heartbeats from this rank."""
        self._done.set()
        self.join()
        disarm(self)
        self._set("beat", DONE)

    def exit(self, status: int) -> NoReturn:
        """End this process after its failure; the others follow."""
        time.sleep(LINGER)
        _end_process(status)

    def _set(self, name: str, value: str) -> None:
        self.store.set(f"{name}/{self.rank}", value)

    def _get(self, name: str, rank: int) -> str:
        """What `rank` has set; "" if nothing yet."""
        key = f"{name}/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _beats(self) -> dict[int, str]:
        return {rank: self._get("beat", rank) for rank in range(self.size)}

    def _collectives_of_others(self) -> list[int]:
        beats = [beat for rank, beat in self._beats().items() if rank != self.rank and beat not in ("", DONE)]
        return [int(beat.split()[1]) for beat in beats]

    def _end_if_hung(self) -> None:
        hang = self._hang
        if hang is None or self.failed or not hang.is_exceeded(INTERVAL, self._collectives_of_others):
            return
        if not self.claim_first_failure():
            return
        self.failed = True
        what = f"no progress for {hang.seconds:g} s (hang_timeout) at {main_thread_place()}"
        # Nothing that the main thread may hold: no buffer, no lock.
        print_tracebacks(
            f"rank {self.rank} on {socket.gethostname()}: {what}. All processes end. Resume; if a step needs more time, raise "
            "hang_timeout in the run's config.json, or set it to null for no limit."
        )
        self.report(what)
        time.sleep(LINGER)
        os._exit(STATUS)

    def _exit_after(self, failure: dict[str, Any]) -> NoReturn:
        self.ending = True
        who = "" if failure["rank"] is None else f"rank {failure['rank']}"
        who += f" on {failure['host']}" if failure.get("host") else ""
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
