"""One process to a run folder."""

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


class RunFolderError(ValueError):
    """The run folder is another run's, or another process writes there."""


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Within, no other process can enter for the folder `run`. The operating system ends it with the process.

    A file system that has no locks is warned of.

    Raises:
        RunFolderError: another process is within, or the lock's file cannot be opened.
    """
    try:
        opened = (run / FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{str(run / FILE)!r} cannot be opened ({error.strerror}); remove it.") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunFolderError(
                f"run = {str(run)!r}: {file.read().strip() or 'another process'} is writing there; wait for it to end, "
                "or name another folder."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logger.warning("%s cannot be locked (%s): see to it that one process alone writes there", run, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
