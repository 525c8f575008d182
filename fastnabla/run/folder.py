"""The folder of a new run."""

import glob
import itertools
from pathlib import Path


def create_run_folder(run: Path | None, name: str) -> Path:
    """Create the folder `run`, or if it is None, the next free ``runs/name-001``. Returns its path.

    Processes that start at the same time get folders of their own, unless they name one.

    Raises:
        ValueError: the folder exists, or cannot be created.
    """
    if run is not None:
        if not _created(run):
            raise ValueError(
                f"run = {str(run)!r}: exists already and is never overwritten; name another folder, or remove it."
            )
        return run
    numbers = [path.name.removeprefix(f"{name}-") for path in Path("runs").glob(f"{glob.escape(name)}-*")]
    first = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
    folders = (Path("runs") / f"{name}-{number:03d}" for number in itertools.count(first))
    return next(folder for folder in folders if _created(folder))


def _created(run: Path) -> bool:
    """Create the folder. Returns whether it did not exist.

    Raises:
        ValueError: it cannot be created.
    """
    try:
        run.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise ValueError(f"run = {str(run)!r}: cannot be created ({error}).") from error
    return True
