"""The folder of a new run."""

import glob
from pathlib import Path


def create_run_folder(run: Path | None, name: str) -> Path:
    """Make the folder `run`, or the next free ``runs/name-001``.

    Raises:
        ValueError: it exists, or cannot be made.
    """
    if run is None:
        taken = [int(p.name.rpartition("-")[2]) for p in Path("runs").glob(f"{glob.escape(name)}-[0-9][0-9][0-9]")]
        run = Path("runs") / f"{name}-{max(taken, default=0) + 1:03d}"
    try:
        run.mkdir(parents=True)
    except FileExistsError as error:
        raise ValueError(
            f"run = {str(run)!r}: exists already, and is never overwritten; name another or remove it."
        ) from error
    except OSError as error:
        raise ValueError(f"run = {str(run)!r}: cannot be created ({error}).") from error
    return run
