"""The folder of a new run."""

import threading
from pathlib import Path

import pytest

from fastnabla.run.folder import create_run_folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("existing", "expected"),
    [
        ([], "a-001"),
        (["a-001", "a-007"], "a-008"),
        (["a-999", "a-1000"], "a-1001"),
        (["a-b-005", "a-x", "b-009"], "a-001"),
    ],
)
def test_the_next_number(existing: list[str], expected: str) -> None:
    for name in existing:
        Path("runs", name).mkdir(parents=True)
    assert create_run_folder(None, "a") == Path("runs", expected)
    assert Path("runs", expected).is_dir()


def test_processes_that_start_together_get_different_folders() -> None:
    found, start = [], threading.Barrier(8)

    def create() -> None:
        start.wait()
        found.append(create_run_folder(None, "a"))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [Path("runs", f"a-{number:03d}") for number in range(1, 9)]


def test_a_folder_that_is_named_is_never_overwritten() -> None:
    create_run_folder(Path("mine"), "a")
    with pytest.raises(ValueError, match=r"run = 'mine': exists already and is never overwritten"):
        create_run_folder(Path("mine"), "a")
    Path("file").touch()
    with pytest.raises(ValueError, match=r"run = 'file/below': cannot be created"):
        create_run_folder(Path("file/below"), "a")
