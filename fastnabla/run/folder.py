"""The folder of a new run."""

import glob
from pathlib import Path


def create_run_folder(run: Path | None, name: str) -> Path:
    """Create the folder `run`, or if it is None, the next free ``runs/name-001``. Returns its path.

    Raises:
        ValueError: the folder exists, or cannot be created.
    """
    if run is None:
        taken = [int(p.name.rpartition("-")[2]) for p in Path("runs").glob(f"{glob.escape(name)}-[0-9][0-9][0-9]")]
        run = Path("runs") / f"{name}-{max(taken, default=0) + 1:03d}"
    try:
        run.mkdir(parents=True)
    except FileExistsError as error:
        raise ValueError(
            f"run = {str(run)!r}: exists already and is never overwritten; name another folder, or remove it."
        ) from error
    except OSError as error:
        raise ValueError(f"run = {str(run)!r}: cannot be created ({error}).") from error
    return run
