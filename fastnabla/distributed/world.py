"""The processes of a run that trains data-parallel, as one of them sees them: `World`.

Every process (rank) holds all networks and computes its share of each batch; what they add up is the whole batch's
gradient, once an optimizer step. Methods of `World` are collective: all ranks call them, in the same order, or none does.
Alone, they do nothing and need no process group, so code is written once, for any number of ranks.

Tensors go by NCCL where they are on a GPU and by gloo on the host, so that what only the host has to know never waits for
a device. Plain data goes as JSON; nothing is pickled.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.rendezvous import rendezvous
from fastnabla.distributed.watchdog import Watchdog

T = TypeVar("T")

BUCKET = 2**26
"""Bytes that are summed at once."""
START = timedelta(minutes=5)
"""For all processes to come."""
LIMIT = timedelta(hours=1)
"""For one to wait for the others, as while the first evaluates; those that die are found sooner, by `fastnabla.distributed.watchdog`."""


CPU = torch.device("cpu")
PATIENCE = 10.0
"""Seconds within which a process that another has lost says why, if it can."""


class LostProcess(RuntimeError):
    """Another process of the run can no longer be reached: it was killed, or its machine is gone."""


class World:
    """The ranks of a run; a run alone if nothing is given.

    Args:
        info: this process's.
        watchdog: what ends the run's processes when one of them fails; None alone.
    """

    def __init__(self, info: RankInfo | None = None, watchdog: Watchdog | None = None) -> None:
        self.rank_info, self.watchdog = info or RankInfo(), watchdog
        self.rank, self.size, self.local_rank = self.rank_info.rank, self.rank_info.size, self.rank_info.local_rank
        self.local_size = self._on_this_machine()
        """Ranks on this machine."""

    @classmethod
    def start(cls, info: RankInfo, device: torch.device = CPU) -> "World":
        """Meet the other processes. `shutdown` is the end of it.

        Args:
            info: of this process; alone, nothing is started.
            device: where it computes, a GPU's with its number.

        Raises:
            ValueError: they do not come.
        """
        if info.size == 1:
            return cls(info)
        os.environ |= {"MASTER_ADDR": info.address, "MASTER_PORT": str(info.port)}
        try:
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
                f"not all {info.size} processes came to {info.address}:{info.port} within {START} ({error}). Start all "
                "with torchrun, accelerate launch or srun; or set WORLD_SIZE=1 RANK=0 for one alone."
            ) from error
        watchdog = Watchdog(dist.PrefixStore(attempt, store.clone()), info.rank, info.size, info.local_rank == 0)
        watchdog.start()
        return cls(info, watchdog)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """Of this process, in messages."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def fail(self, error: BaseException | str, show: Callable[[], None]) -> None:
        """Show why this rank ends, and tell the others, which end within seconds. Not collective.

        Args:
            error: why.
            show: not called where another rank has failed first, of which this may be a consequence, or the same again.
        """
        if self.watchdog is None:
            show()
            return
        if isinstance(error, LostProcess):
            silent = self.watchdog.silent(PATIENCE)  # meanwhile it ends this process, if another says why it is gone
            error.args = (f"{error}; no sign of life from ranks {silent}" if silent else str(error),)
        self.watchdog.failed = True
        if self.watchdog.is_first():
            show()
            if isinstance(error, Exception):
                get_error_handler().record_exception(error)  # for torchrun's summary
            self.watchdog.tell(error if isinstance(error, str) else f"{type(error).__name__}: {error}")

    def shutdown(self, status: int) -> int:
        """End this process's part: together with the others, or if it has failed, at once and without return. The exit
        status, `status`."""
        if self.watchdog is not None:
            if self.watchdog.failed:
                self.watchdog.leave(status)
            self.watchdog.done()
            self.barrier()
            dist.destroy_process_group()
        return status

    def rank_rows(self, count: int) -> Tensor:
        """This rank's of `count` things: consecutive numbers `[n]` int64, as many as the others' or one more or less."""
        return torch.arange(count).tensor_split(self.size)[self.rank]

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Make each of `tensors` the sum of all ranks', in place. They go in flat buckets of at most `BUCKET` bytes, or one
        tensor; all ranks get the same bits."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self._all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view(t.shape) for part, t in zip(parts, bucket, strict=True)])

    def sum(self, number: int) -> int:
        """The sum of all ranks' numbers."""
        return self._of_all(number, dist.ReduceOp.SUM)

    def max(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return self._of_all(number, dist.ReduceOp.MAX)

    @torch.no_grad()
    def all_gather_rows(self, rows: Tensor, index: Tensor, count: int) -> Tensor:
        """What all ranks' rows make up, `[count, …]`, on every rank.

        Args:
            rows: this rank's, `[n, …]`; on every rank of the same dtype, and of the same shape but for n.
            index: where they belong, `[n]` int64, on the host. Every place is some rank's, and no other's.
            count: of rows in all.
        """
        flags = rows.dtype == torch.bool
        whole = rows.new_zeros((count, *rows.shape[1:]), dtype=torch.uint8 if flags else rows.dtype)
        whole[index.to(rows.device, non_blocking=True)] = rows.to(whole.dtype)
        if self.size > 1:
            self._all_reduce(whole)
        return whole.bool() if flags else whole

    def span(self, count: int) -> tuple[Tensor, int]:
        """Places `[count]` of this rank's `count` rows among all ranks' in the order of ranks, and how many all are."""
        counts = self.all_gather_rows(torch.tensor([count]), torch.tensor([self.rank]), self.size)
        return int(counts[: self.rank].sum()) + torch.arange(count), int(counts.sum())

    def all_gather(self, rows: Tensor) -> Tensor:
        """All ranks' rows `[n, …]`, in the order of ranks, on every rank; each may have another n."""
        return self.all_gather_rows(rows, *self.span(len(rows)))

    def broadcast(self, value: Callable[[], T]) -> T:
        """What `value()`, asked on rank 0 alone, returns: JSON data. Alone, as it is; else as JSON gives it back."""
        if self.size == 1:
            return value()
        return json.loads(self.broadcast_bytes(lambda: json.dumps(value()).encode()))

    def broadcast_bytes(self, value: Callable[[], bytes]) -> bytes:
        """What `value()`, asked on rank 0 alone, returns."""
        if self.size == 1:
            return value()
        data = torch.frombuffer(bytearray(value()), dtype=torch.uint8) if self.is_main else None
        length = self.sum(len(data) if self.is_main else 0)
        if data is None:
            data = torch.empty(length, dtype=torch.uint8)
        with _reaching():
            dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def barrier(self) -> None:
        """Wait until all ranks are here. The host does; devices may be behind."""
        self.sum(0)

    def _of_all(self, number: int, operation: dist.ReduceOp) -> int:
        if self.size == 1:
            return number
        value = torch.tensor(number)
        self._all_reduce(value, operation)
        return int(value)

    def _all_reduce(self, tensor: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> None:
        with _reaching():
            dist.all_reduce(tensor, operation)

    def _on_this_machine(self) -> int:
        if self.size == 1:
            return 1
        own = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7], "big")
        return int((self.all_gather(torch.tensor([own])) == own).sum())


ALONE = World()


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            f"another process can no longer be reached: was it killed? ({str(error).rstrip()})"
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors`, in order, by dtype and device, in groups of at most `BUCKET` bytes."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bucket = groups.setdefault((tensor.dtype, tensor.device), [])
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET:
            yield bucket
            bucket = groups[tensor.dtype, tensor.device] = []
        bucket.append(tensor)
    yield from groups.values()


def log_as(world: World) -> None:
    """Let rank 0 alone log what all ranks would, and each process, by its name, what happens to it alone (the logger
    `fastnabla.process`)."""
    if world.size == 1:
        return

    def named(record: logging.LogRecord) -> bool:
        record.msg = f"{world.name}: {record.msg}"
        return True

    logging.getLogger("fastnabla.process").addFilter(named)
    if not world.is_main:
        logging.getLogger("fastnabla").addFilter(lambda record: False)
