"""Atomic writes of files and folders: after a crash of the process or the machine, they exist completely or not at all.

A folder is written under a temporary name, with a manifest of its files' sizes and SHA-256 digests. Everything is flushed to
disk, and then the folder is renamed. On reading, the manifest reveals truncated and corrupt files.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "manifest.json"

Write = Callable[[BinaryIO], None]
"""Writes a file's content sequentially."""


class DamagedError(Exception):
    """A folder is corrupt; the message says how."""


class _Digesting:
    """A file that computes a digest of what is written to it, and keeps the error of a failed write."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes, self.digest, self.error = file, 0, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def fsync_folder(folder: Path) -> None:
    """Flush the directory entries of `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, write: Write) -> dict[str, Any]:
    """Write a file with `write` and flush it to disk. Returns its size and digest."""
    with path.open("wb") as file:
        digesting = _Digesting(file)
        try:
            write(digesting)
        except Exception:
            if digesting.error is not None:  # torch.save replaces an OSError by its own exception
                raise digesting.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": digesting.bytes, "sha256": digesting.digest.hexdigest()}


def write_file(path: Path, content: str | bytes) -> None:
    """Atomically replace the file `path` with `content`; text is encoded as UTF-8."""
    partial = path.with_name(f".{path.name}.partial")
    _write(partial, lambda file: file.write(content.encode() if isinstance(content, str) else content))
    os.replace(partial, path)
    fsync_folder(path.parent)


def require_writable(path: Path, field: str) -> None:
    """Check that the file `path` can be written, and create its folder.

    Raises:
        ValueError: it cannot; the message names `field`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        probe = path.with_name(f".{path.name}.{os.getpid()}.partial")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{field} = {str(path)!r}: cannot be written ({error.strerror or error}); make it writable, or use another place."
        ) from error


def move_files(source: Path, target: Path) -> None:
    """Move all files below `source` to the same relative paths below `target`, replacing existing files atomically, and
    remove `source`."""
    for path in sorted(source.rglob("*")):
        destination = target / path.relative_to(source)
        if path.is_dir():
            destination.mkdir(exist_ok=True)
            continue
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, destination)
        fsync_folder(destination.parent)
    shutil.rmtree(source)


def partial_folder(folder: Path) -> Path:
    """The temporary name under which `write_folder` writes `folder`."""
    return folder.with_name(f".{folder.name}.partial")


def write_folder(
    folder: Path, files: Mapping[str, Write], facts: Mapping[str, Any], fill: Callable[[Path], None] | None = None
) -> None:
    """Write `folder` atomically, replacing an existing one.

    Args:
        folder: to write. Leftovers of crashed writes in its parent are removed.
        files: by name, the functions that write the files.
        facts: further entries of the manifest, JSON.
        fill: writes further files below the folder that it is given, and flushes them to disk. Other processes may write there
            meanwhile.

    Raises:
        OSError: the folder cannot be written; no trace of it is left.
    """
    parent = folder.parent
    parent.mkdir(exist_ok=True)
    for leftover in (*parent.glob(".*.partial"), *parent.glob(".*.old")):
        _remove(leftover)
    partial = partial_folder(folder)
    try:
        partial.mkdir()
        filled = {}
        if fill is not None:
            fill(partial)
            filled = {str(path.relative_to(partial)): _entry(path) for path in _flushed(partial)}
        entries = filled | {name: _write(partial / name, write) for name, write in files.items()}
        _write(partial / MANIFEST, lambda file: file.write(_sealed({**facts, "files": entries}).encode()))
        fsync_folder(partial)
        replaced = _set_aside(folder) if os.path.lexists(folder) else None
        os.replace(partial, folder)
        fsync_folder(parent)
        fsync_folder(parent.parent)
        if replaced is not None:
            _remove(replaced)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _flushed(folder: Path) -> list[Path]:
    """The files below `folder`, after flushing their directory entries to disk."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_dir():
            fsync_folder(path)
    return [path for path in paths if path.is_file()]


def _entry(path: Path) -> dict[str, Any]:
    """Size and digest of an existing file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def remove_folder(folder: Path) -> None:
    """Remove `folder` atomically: after a crash, remains of it have another name."""
    _remove(_set_aside(folder))


def _remove(path: Path) -> None:
    """Remove a folder, or a file or link in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f".{folder.name}.old")
    if os.path.lexists(aside):
        _remove(aside)
    os.replace(folder, aside)
    return aside


def _sealed(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest | {"seal": _seal(manifest)}, indent=2) + "\n"


def _seal(manifest: dict[str, Any]) -> str:
    """Digest of the manifest without its seal."""
    rest = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify_folder(folder: Path) -> dict[str, Any]:
    """Verify every file of `folder` against its manifest. Returns the manifest.

    Raises:
        DamagedError: a file or the manifest is missing, unreadable or changed.
    """
    try:
        _require_file(folder / MANIFEST)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["seal"] != _seal(manifest):
            raise DamagedError(f"{MANIFEST} is not as it was written")
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is not as it was written ({type(error).__name__})") from error
    for name, entry in manifest["files"].items():
        try:
            _require_file(folder / name)
            size, digest = (folder / name).stat().st_size, None
            if size == entry["bytes"]:
                with (folder / name).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
        if size != entry["bytes"]:
            raise DamagedError(f"{name} has {size:,} bytes instead of {entry['bytes']:,}")
        if digest != entry["sha256"]:
            raise DamagedError(f"{name} is not as it was written (its SHA-256 differs)")
    return manifest


def _require_file(path: Path) -> None:
    """Opening something else, such as a pipe, could block forever."""
    if path.exists() and not path.is_file():
        raise DamagedError(f"{path.name} is not a regular file")
