"""Folders that are there whole or not at all, and what decays in them."""

import errno
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastnabla.utils import durable
from fastnabla.utils.durable import (
    DamagedError,
    move_files,
    remove_folder,
    require_writable,
    verify_folder,
    write_file,
    write_folder,
)

FILES = {
    "state.pt": lambda file: torch.save({"weights": torch.arange(300.0)}, file),
    "notes": lambda file: file.write(b"x" * 1000),
    "empty": lambda file: None,
}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_folder_is_verified_and_holds_what_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "all" / "one"
    write_folder(folder, FILES, {"update": 7})
    manifest = verify_folder(folder)
    assert manifest["update"] == 7
    assert manifest["files"]["notes"]["bytes"] == 1000
    assert names(tmp_path) == [
        "all",
        "all/one",
        *(f"all/one/{n}" for n in ("empty", "manifest.json", "notes", "state.pt")),
    ]
    assert torch.equal(torch.load(folder / "state.pt", weights_only=True)["weights"], torch.arange(300.0))


def places(size: int) -> list[int]:
    return sorted({0, 1, size // 4, size // 2, size * 3 // 4, size - 2, size - 1} & set(range(size)))


@pytest.mark.parametrize("name", ["state.pt", "notes", "manifest.json"])
def test_every_cut_and_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    write_folder(folder, FILES, {"update": 7})
    path = folder / name
    content = path.read_bytes()
    for place in places(len(content)):
        path.write_bytes(content[:place])
        if content[place:] != b"\n":  # of the manifest's end, which says nothing
            with pytest.raises(DamagedError, match=name):
                verify_folder(folder)
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(DamagedError, match=name):
                verify_folder(folder)
    path.write_bytes(content + b"!")
    with pytest.raises(DamagedError, match=name):
        verify_folder(folder)
    path.unlink()
    with pytest.raises(DamagedError, match=f"{name} cannot be read"):
        verify_folder(folder)
    path.write_bytes(content)
    verify_folder(folder)


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    """But for white space, which cannot become other white space by one bit."""
    write_folder(tmp_path / "one", FILES, {"update": 7, "version": "1.2.3"})
    path = tmp_path / "one" / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedError):
            verify_folder(tmp_path / "one")


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(monkeypatch: pytest.MonkeyPatch, what: str, call: int) -> None:
    """Let the disk be full from call number `call` on, from 0, of "write", "fsync" or "replace"."""
    calls = itertools.count()

    def limited(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (no_space if next(calls) >= call else function)(*arguments)

    if what != "write":
        monkeypatch.setattr(os, what, limited(getattr(os, what)))
        return
    prepare = durable._Digesting.__init__

    def prepared(self, file):
        prepare(self, SimpleNamespace(write=limited(file.write), flush=file.flush))

    monkeypatch.setattr(durable._Digesting, "__init__", prepared)


@pytest.mark.parametrize(
    ("what", "call"),
    [("write", call) for call in (0, 1, 5, 12)] + [("fsync", call) for call in range(6)] + [("replace", 0)],
)
def test_a_full_disk_leaves_what_was_there(
    what: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "one", FILES, {"update": 1})
    with monkeypatch.context() as patch:
        fill(patch, what, call)
        with pytest.raises(OSError, match="No space left") as error:
            write_folder(tmp_path / "two", FILES, {"update": 2})
    assert error.value.errno == errno.ENOSPC
    assert verify_folder(tmp_path / "one")["update"] == 1
    if (what, call) != ("fsync", 5):  # that of the parent, when all is done
        assert not (tmp_path / "two").exists()
    write_folder(tmp_path / "two", FILES, {"update": 2})
    assert verify_folder(tmp_path / "two")["update"] == 2


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    def write(kilobytes: int, name: str) -> None:
        state = torch.zeros(kilobytes * 256)
        write_folder(tiny_disk / "all" / name, {"state.pt": lambda file: torch.save(state, file)}, {"update": 1})

    write(100, "one")
    with pytest.raises(OSError, match="No space left"):
        write(200, "two")
    assert verify_folder(tiny_disk / "all" / "one")["update"] == 1
    assert names(tiny_disk / "all") == ["one", "one/manifest.json", "one/state.pt"]
    write(90, "three")


def test_errors_of_a_writer_are_its_own(tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write_folder(tmp_path / "one", {"file": fail}, {})
    assert names(tmp_path) == []


def test_a_folder_is_replaced_and_leftovers_go(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", FILES, {"update": 1})
    (tmp_path / ".zero.partial").mkdir()
    (tmp_path / ".zero.partial" / "file").touch()
    (tmp_path / ".zero.old").mkdir()
    (tmp_path / ".keep").touch()
    write_folder(tmp_path / "one", {"other": FILES["notes"]}, {"update": 2})
    assert verify_folder(tmp_path / "one")["update"] == 2
    write_folder(tmp_path / "two", {}, {})
    assert names(tmp_path) == [".keep", "one", "one/manifest.json", "one/other", "two", "two/manifest.json"]
    remove_folder(tmp_path / "one")
    assert names(tmp_path) == [".keep", "two", "two/manifest.json"]


def test_single_files_are_replaced(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "first")
    write_file(tmp_path / "file", "second ∇")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "second ∇"
    (tmp_path / "new" / "deeper").mkdir(parents=True)
    (tmp_path / "new" / "file").write_text("third")
    (tmp_path / "new" / "deeper" / "file").write_text("fourth")
    move_files(tmp_path / "new", tmp_path)
    assert names(tmp_path) == ["deeper", "deeper/file", "file"]
    assert (tmp_path / "file").read_text() + (tmp_path / "deeper" / "file").read_text() == "thirdfourth"


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "new" / "a.png", "output")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(ValueError, match=r"output = '.*new': cannot be written \(it is a folder\); make it writable"):
        require_writable(tmp_path / "new", "output")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output = '.*file/a\.png': cannot be written"):
        require_writable(tmp_path / "file" / "a.png", "output")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refused)  # root may write everywhere
    with pytest.raises(ValueError, match=r"output = .*cannot be written \(Permission denied\)"):
        require_writable(tmp_path / "a.png", "output")
