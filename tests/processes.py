"""A function run by several processes of this machine that talk over gloo, forked so that none imports torch again."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60


def on_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returns on each of `size` processes: anything that torch.load allows.

    Raises:
        AssertionError: it raised on one, whose traceback this is, or took longer than `TIMEOUT` seconds.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_run, args=(rank, size, folder, function, arguments)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
            if process.is_alive():
                process.kill()
                process.join()
        errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
        assert not errors, "\n".join(errors)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * size, f"exit codes {codes}"
        return [torch.load(folder / f"result-{rank}", weights_only=True) for rank in range(size)]


def _run(rank: int, size: int, folder: Path, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    timeout = timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timeout)
    try:
        torch.save(function(rank, *arguments), folder / f"result-{rank}")
    except BaseException:
        (folder / f"error-{rank}").write_text(f"process {rank}: {traceback.format_exc()}")
    finally:
        dist.destroy_process_group()
