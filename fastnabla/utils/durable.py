"""Files and folders that are there whole or not at all, whatever ends the process or the machine.

A folder is written under another name, with a manifest of its files' sizes and SHA-256; everything is flushed to the
disk; and only then does it get its name, in one step. What is read can so be told from what was cut off or has decayed.
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
"""Writes a file's content, front to back."""


class DamagedError(Exception):
    """A folder is not as it was written; the message says what is wrong with it."""


class _Digesting:
    """A file that computes the digest of what is written to it, and remembers why a write failed."""

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
    """Flush the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, write: Write) -> dict[str, Any]:
    """Size and digest of the file that `write` makes, once it is on the disk."""
    with path.open("wb") as file:
        digesting = _Digesting(file)
        try:
            write(digesting)
        except Exception:
            if digesting.error is not None:  # torch.save reports a full disk as an error of its own
                raise digesting.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": digesting.bytes, "sha256": digesting.digest.hexdigest()}


def write_file(path: Path, content: str | bytes) -> None:
    """Replace the file `path` by one that holds `content`, text as UTF-8."""
    partial = path.with_name(f".{path.name}.partial")
    _write(partial, lambda file: file.write(content.encode() if isinstance(content, str) else content))
    os.replace(partial, path)
    fsync_folder(path.parent)


def move_files(source: Path, target: Path) -> None:
    """Move all files below `source` to the same places below `target`, each replacing its namesake in one step; `source`
    is gone afterwards."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
            continue
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, place)
        fsync_folder(place.parent)
    shutil.rmtree(source)


def partial_folder(folder: Path) -> Path:
    """Where `write_folder` writes it."""
    return folder.with_name(f".{folder.name}.partial")


def write_folder(
    folder: Path, files: Mapping[str, Write], facts: Mapping[str, Any], fill: Callable[[Path], None] | None = None
) -> None:
    """Write `folder`, replacing one of that name.

    Args:
        folder: to be written. What crashes left of such writes in its parent is removed.
        files: what writes each file, by name.
        facts: what else the manifest says, JSON.
        fill: writes further files, below the folder that it is given, and flushes them to the disk, as other processes may
            do meanwhile.

    Raises:
        OSError: it cannot be written; there is no trace of it then.
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
    """The files below `folder`, whose names are on the disk."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_dir():
            fsync_folder(path)
    return [path for path in paths if path.is_file()]


def _entry(path: Path) -> dict[str, Any]:
    """Size and digest of a file as it is."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def remove_folder(folder: Path) -> None:
    """Remove `folder`; what a crash leaves of it does not have its name."""
    _remove(_set_aside(folder))


def _remove(path: Path) -> None:
    """Remove a folder, or what has been put in its place."""
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
    """Digest of all that the manifest says, but for the seal."""
    rest = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify_folder(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, every file of which is as it was written.

    Raises:
        DamagedError: one is not, or is missing, or the manifest is not as it was written.
    """
    try:
        _require_file(folder / MANIFEST)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["seal"] != _seal(manifest):
            raise DamagedError(f"{MANIFEST} is not what was written")
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is not what was written ({type(error).__name__})") from error
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
            raise DamagedError(f"{name} has {size:,} bytes, and had {entry['bytes']:,}")
        if digest != entry["sha256"]:
            raise DamagedError(f"{name} has other content than was written (its SHA-256 differs)")
    return manifest


def _require_file(path: Path) -> None:
    """Opening another thing, such as a pipe, can take for ever."""
    if path.exists() and not path.is_file():
        raise DamagedError(f"{path.name} is not a file")
