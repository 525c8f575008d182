"""`World`: the ranks of a data-parallel run, and their collective operations.

Every rank holds all networks and computes its rows of each batch. The gradients are summed over the ranks once per optimizer
step. Unless stated otherwise, methods of `World` are collective: all ranks call them, in the same order. With a single rank
they do nothing and need no process group, so callers do not distinguish the cases.

CUDA tensors use NCCL and CPU tensors gloo, so that exchanging host data does not synchronise with a device. Other data is
sent as JSON; nothing is pickled.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fastnabla.distributed.beacon import BEACON
from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.rendezvous import rendezvous
from fastnabla.distributed.watchdog import Watchdog

T = TypeVar("T")

BUCKET = 2**26
"""Bytes in one all-reduce."""
START = timedelta(minutes=5)
"""Time limit for all ranks to start."""
SILENT = 3.0
"""Seconds after which a process says what it waits for."""
LIMIT = timedelta(hours=1)
"""Time limit of a collective operation, long enough for rank 0 to evaluate alone. `fastnabla.distributed.watchdog` detects
dead ranks and those that hang sooner."""


CPU = torch.device("cpu")
PATIENCE = 10.0
"""Seconds to wait for a lost rank to report why it failed. After that, its loss is reported."""


class LostProcess(RuntimeError):
    """Another rank can no longer be reached: it was killed, or its machine is gone."""


class World:
    """The ranks of a run; a single rank by default.

    Args:
        info: this process's rank and the number of ranks.
        watchdog: ends all ranks when one of them fails; None for a single rank.
    """

    def __init__(self, info: RankInfo | None = None, watchdog: Watchdog | None = None) -> None:
        self.rank_info, self.watchdog = info or RankInfo(), watchdog
        self.rank, self.size = self.rank_info.rank, self.rank_info.size
        self.local_size = self._on_this_machine()
        """Number of ranks on this machine."""

    @classmethod
    def start(cls, info: RankInfo, device: torch.device = CPU) -> "World":
        """Connect to the other ranks. Call `shutdown` at the end.

        Args:
            info: this process's rank and the number of ranks; for a single rank nothing is started.
            device: this rank's device; a GPU with its index.

        Raises:
            ValueError: not all ranks start within `START`.
        """
        if info.size == 1:
            return cls(info)
        os.environ |= {"MASTER_ADDR": info.address, "MASTER_PORT": str(info.port)}
        try:
            with _announced_wait(info):
                store, _, _ = next(dist.rendezvous(f"env://?rank={info.rank}&world_size={info.size}", timeout=START))
                attempt = rendezvous(store, info.rank, info.size, START)
            backend = "gloo"
            if device.type == "cuda":
                backend = "cpu:gloo,cuda:nccl"
                torch.cuda.set_device(device)
            own = dist.PrefixStore(attempt, store)
            dist.init_process_group(backend, store=own, rank=info.rank, world_size=info.size, timeout=LIMIT)
        except RuntimeError as error:
            raise ValueError(
                f"not all {info.size} processes connected to {info.address}:{info.port} within {START} ({error}). Start "
                "all of them with torchrun, accelerate launch, mpirun or srun, or set WORLD_SIZE=1 RANK=0 for a single process. "
                "If another job has the port, set MASTER_PORT to a free one."
            ) from error
        watchdog = Watchdog(dist.PrefixStore(attempt, store.clone()), info.rank, info.size, info.local_rank == 0)
        watchdog.start()
        return cls(info, watchdog)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run's files."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """This process's name in messages."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def fail(self, error: BaseException | str, show: Callable[[], None]) -> None:
        """Show this rank's failure and report it to the others, which end within seconds. Not collective.

        Args:
            error: the reason.
            show: prints the error. It is called in the first rank that fails and in the first of each host, which else may end
                without a reason.
        """
        if self.watchdog is None:
            show()
            return
        if isinstance(error, LostProcess):
            # If the lost rank reports a reason meanwhile, the watchdog prints it.
            silent = self.watchdog.silent_ranks(PATIENCE)
            if self.watchdog.ending:  # it knows the reason, and ends this process
                threading.Event().wait()
            error.args = (f"{error}; no heartbeat from ranks {silent}" if silent else str(error),)
        self.watchdog.failed = True
        first = self.watchdog.claim_first_failure()
        if first or self.watchdog.prints:
            show()
        if first:
            if isinstance(error, Exception):
                get_error_handler().record_exception(error)  # for torchrun's summary
            self.watchdog.report(error if isinstance(error, str) else f"{type(error).__name__}: {error}")

    def hang_limit(self, seconds: float | None) -> contextlib.AbstractContextManager[None]:
        """A context within which all ranks end if this one's main thread makes no progress (`fastnabla.distributed.beacon`)
        for `seconds`; None for no limit. Not collective. A single rank has no limit, because nobody waits for it."""
        return contextlib.nullcontext() if self.watchdog is None else self.watchdog.hang_limit(seconds)

    def shutdown(self, status: int) -> int:
        """Disconnect from the other ranks and return `status`, the exit status. After a failure this is not collective: it
        ends the process and does not return."""
        if self.watchdog is not None:
            if self.watchdog.failed:
                self.watchdog.exit(status)
            self.watchdog.stop()
            self.barrier()
            dist.destroy_process_group()
        return status

    def rank_rows(self, count: int) -> Tensor:
        """This rank's part of `count` rows: consecutive indices `[n]` int64. Ranks' parts differ by at most one row in
        length. Not collective."""
        return torch.arange(count).tensor_split(self.size)[self.rank]

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of `tensors` by its sum over the ranks, in place; bitwise identical on all ranks.

        Tensors are all-reduced in flat buckets of at most `BUCKET` bytes, or of a single tensor.
        """
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self._all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view(t.shape) for part, t in zip(parts, bucket, strict=True)])

    def sum(self, number: int) -> int:
        """The sum of the ranks' numbers."""
        return self._of_all(number, dist.ReduceOp.SUM)

    def max(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return self._of_all(number, dist.ReduceOp.MAX)

    @torch.no_grad()
    def all_gather_rows(self, rows: Tensor, index: Tensor, count: int) -> Tensor:
        """Assemble all ranks' rows to a tensor `[count, …]`, on every rank.

        Args:
            rows: this rank's rows `[n, …]`; dtype and trailing shape are the same on all ranks, n may differ.
            index: their positions in the result, `[n]` int64, on the host. Every position belongs to exactly one rank.
            count: total number of rows.
        """
        flags = rows.dtype == torch.bool
        whole = rows.new_zeros((count, *rows.shape[1:]), dtype=torch.uint8 if flags else rows.dtype)
        whole[index.to(rows.device, non_blocking=True)] = rows.to(whole.dtype)
        if self.size > 1:
            self._all_reduce(whole)
        return whole.bool() if flags else whole

    def span(self, count: int) -> tuple[Tensor, int]:
        """Positions `[count]` of this rank's `count` rows among the rows of all ranks, in rank order; and their total."""
        counts = self.all_gather_rows(torch.tensor([count]), torch.tensor([self.rank]), self.size)
        return int(counts[: self.rank].sum()) + torch.arange(count), int(counts.sum())

    def all_gather(self, rows: Tensor) -> Tensor:
        """All ranks' rows `[n, …]` concatenated in rank order, on every rank; n may differ between ranks."""
        return self.all_gather_rows(rows, *self.span(len(rows)))

    def broadcast(self, value: Callable[[], T]) -> T:
        """The result of `value()`, which only rank 0 calls. With several ranks it is JSON data and is returned after a JSON
        round trip; a single rank's is returned as is."""
        if self.size == 1:
            return value()
        return json.loads(self.broadcast_bytes(lambda: json.dumps(value()).encode()))

    def broadcast_bytes(self, value: Callable[[], bytes]) -> bytes:
        """The result of `value()`, which only rank 0 calls."""
        if self.size == 1:
            return value()
        data = torch.frombuffer(bytearray(value()), dtype=torch.uint8) if self.is_main else None
        length = self.sum(len(data) if self.is_main else 0)
        if data is None:
            data = torch.empty(length, dtype=torch.uint8)
        with collective():
            dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def barrier(self) -> None:
        """Wait until all ranks have arrived. Only hosts are synchronised, not devices."""
        self.sum(0)

    def _of_all(self, number: int, operation: dist.ReduceOp) -> int:
        if self.size == 1:
            return number
        value = torch.tensor(number)
        self._all_reduce(value, operation)
        return int(value)

    def _all_reduce(self, tensor: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> None:
        with collective():
            dist.all_reduce(tensor, operation)

    def _on_this_machine(self) -> int:
        if self.size == 1:
            return 1
        own = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7], "big")
        return int((self.all_gather(torch.tensor([own])) == own).sum())


ALONE = World()


@contextlib.contextmanager
def _announced_wait(info: RankInfo) -> Iterator[None]:
    """If the context takes more than `SILENT` seconds, say on stderr what this process waits for."""
    place, limit = f"{info.address}:{info.port}", f"{START.total_seconds() / 60:.0f} minutes"
    others = f"its {info.size - 1} other processes" if info.rank == 0 else "rank 0"
    text = f"rank {info.rank} of {info.size} waits for {others} at {place}, for at most {limit}"
    timer = threading.Timer(SILENT, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """The context of a collective operation.

    Raises:
        LostProcess: another process can no longer be reached.
    """
    try:
        with BEACON.collective():
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostProcess(
            f"another process can no longer be reached; it may have been killed ({str(error).rstrip()})"
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in order, grouped by dtype and device into buckets of at most `BUCKET` bytes."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bucket = groups.setdefault((tensor.dtype, tensor.device), [])
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET:
            yield bucket
            bucket = groups[tensor.dtype, tensor.device] = []
        bucket.append(tensor)
    yield from groups.values()


def log_as(world: World) -> None:
    """Log messages common to all ranks only on rank 0. Messages of the logger `fastnabla.process`, about a single rank, are
    logged by that rank, with its name."""
    if world.size == 1:
        return

    def named(record: logging.LogRecord) -> bool:
        record.msg = f"{world.name}: {record.msg}"
        return True

    logging.getLogger("fastnabla.process").addFilter(named)
    if not world.is_main:
        logging.getLogger("fastnabla").addFilter(lambda record: False)
