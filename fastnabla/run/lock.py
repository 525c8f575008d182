"""A lock that lets only one process write into a run folder.

The package filelock uses `flock` too, but it does not name the holder, and it has no warning for file systems without locks.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("fastnabla")

FILE = ".lock"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
"""Errors of the disk or the folder, which removing the file would not mend."""


class RunFolderError(ValueError):
    """The run folder holds another run, or another process writes into it."""


@contextlib.contextmanager
def locked(run: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the run folder `run`. The operating system releases it when the process ends.

    A file system without locks gives a warning.

    Args:
        run: the folder.
        wait: wait until no other process holds the lock.

    Raises:
        OSError: the disk is full or cannot be written.
        RunFolderError: another process holds the lock and `wait` is False, or the lock file cannot be opened.
    """
    try:
        opened = (run / FILE).open("a+", encoding="utf-8")
    except OSError as error:
        if error.errno in DISK:
            raise
        if isinstance(error, FileNotFoundError):
            raise RunFolderError(f"{str(run)!r} does not exist; create the folder first.") from error
        raise RunFolderError(f"{str(run / FILE)!r} cannot be opened ({error.strerror}); remove it.") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            raise RunFolderError(
                f"run = {str(run)!r}: {file.read().strip() or 'another process'} is writing there; wait until it ends, "
                "or name another folder."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logger.warning("%s cannot be locked (%s): make sure that only one process writes there", run, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
