"""One process to a run folder."""

import errno
import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from fastnabla.run.lock import RunFolderError, locked


def test_a_second_one_is_refused_until_the_first_is_out(tmp_path: Path) -> None:
    refused = pytest.raises(RunFolderError, match=f"process {os.getpid()} on .* is writing there")
    with locked(tmp_path), refused, locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_death_ends_it(tmp_path: Path) -> None:
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.write(write, b"!")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(RunFolderError, match=f"process {child} on"), locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path):
        pass


def test_one_that_waits_gets_it_after_the_first(tmp_path: Path) -> None:
    order, inside = [], threading.Event()

    def first() -> None:
        with locked(tmp_path):
            inside.set()
            time.sleep(0.1)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with locked(tmp_path, wait=True):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        pass
    assert "only one process" in caplog.text
