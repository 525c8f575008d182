"""A disk that fails from one operation on: full, over quota, read-only or forbidden, in the files below one folder."""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that any operation can meet. Others meet only those that name a file: opening, creating, renaming."""


class FailingDisk:
    """Counts the operations that change something below a folder, and lets them fail from one on. Enter `patched` to do so.

    Files are counted when opened for writing, at each write and flush; folders when they are made. One call of safetensors, which
    does not write through Python, is one operation.

    Args:
        folder: below which operations count.
        fails_from: number of the first operation that fails, from 0.
        error: number of the system's error.
        named: count only operations that name a file.
    """

    def __init__(self, folder: Path, fails_from: float, error: int, *, named: bool = False) -> None:
        self.folder, self.fails_from, self.error, self.named = str(folder.resolve()), fails_from, error, named
        self.operations: list[str] = []
        """What was counted, in words."""

    def count(self, operation: str, path: str | None) -> None:
        """Count an operation.

        Args:
            operation: its name.
            path: that it names; None if it has only a file's number.

        Raises:
            OSError: it fails.
        """
        if self.named and path is None:
            return
        self.operations.append(f"{operation} {path or ''}")
        if len(self.operations) > self.fails_from:
            raise OSError(self.error, os.strerror(self.error), *([path] if path else []))

    def holds(self, path: Any) -> bool:
        """Whether `path`, which may be an open file's number, is below the folder."""
        return not isinstance(path, int) and os.path.abspath(os.fsdecode(path)).startswith(self.folder)

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Within the context, operations are counted and fail."""
        opened, fsync, save = io.open, os.fsync, safetensors.torch.save_file

        def open_(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not self.holds(path) or not set(mode) & set("wax+"):
                return opened(path, mode, *arguments, **options)
            self.count("open", os.fsdecode(path))
            return _File(opened(path, mode, *arguments, **options), self)

        def named(function: Callable[..., Any]) -> Callable[..., Any]:
            def called(path: Any, *arguments: Any, **options: Any) -> Any:
                if self.holds(path):
                    self.count(function.__name__, os.fsdecode(path))
                return function(path, *arguments, **options)

            return called

        def flushed(number: int) -> None:
            self.count("fsync", None)
            fsync(number)

        def saved(tensors: Any, path: Any, *arguments: Any, **options: Any) -> None:
            try:
                self.count("save_file", os.fsdecode(path))
            except OSError as error:  # as safetensors 0.8 reports it
                raise safetensors.SafetensorError(
                    f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                ) from None
            save(tensors, path, *arguments, **options)

        with (
            mock.patch.object(io, "open", open_),
            mock.patch.object(builtins, "open", open_),
            mock.patch.object(os, "fsync", flushed),
            mock.patch.object(os, "replace", named(os.replace)),
            mock.patch.object(os, "mkdir", named(os.mkdir)),
            mock.patch.object(safetensors.torch, "save_file", saved),
        ):
            yield


class _File:
    """A file whose writes and flushes are counted."""

    def __init__(self, file: Any, disk: FailingDisk) -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._disk.count("write", None)
        return self._file.write(data)

    def flush(self) -> None:
        self._disk.count("flush", None)
        self._file.flush()
