"""Records the rows of a GPU run: each row is in the run's file and its summary before the next is measured.

`bench.gpu` starts every part with the run's file, the part's name and its deadline in the environment. Outside such a run,
rows are only printed, and there is no deadline. Nothing here imports torch.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import report
from bench.tables import Row, Tables, fits_a_cell

FILE, PART, DEADLINE, DRY = (f"FASTNABLA_BENCH_{name}" for name in ("FILE", "PART", "DEADLINE", "DRY"))


def is_run() -> bool:
    """Whether rows are written to a run's file."""
    return FILE in os.environ


def is_dry() -> bool:
    """Whether this is a dry run: everything at toy size on the CPU, to exercise the code."""
    return os.environ.get(DRY) == "1"


def time_left() -> float:
    """Seconds until the part's deadline; infinite outside a run."""
    return float(os.environ.get(DEADLINE, math.inf)) - time.time()


def add(table: str, name: str, **numbers: Any) -> None:
    """Print a row and, in a run, add it to the file and the summary, replacing a row of the same table and name."""
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items() if fits_a_cell(v))
    print(f"{table}: {name}: {', '.join(shown)}", flush=True)
    if is_run():
        append(Path(os.environ[FILE]), {"part": os.environ[PART], "table": table, "name": name, **numbers})


def append(path: Path, row: Row) -> None:
    """Append a line to `path` and rewrite the summary beside it."""
    mark = {"dry run": True} if is_dry() else {}
    with path.open("a") as file:
        file.write(json.dumps(mark | row, ensure_ascii=False, default=str) + "\n")
    replace(path.with_suffix(".md"), report.markdown(read(path)))


def replace(path: Path, text: str) -> None:
    """Write a file atomically."""
    new = path.with_name(f".{path.name}")
    new.write_text(text)
    new.replace(path)


def read(path: Path) -> Tables:
    """The rows of a run. A truncated line is skipped."""
    tables: Tables = {}
    for row in parsed(path.read_text().splitlines() if path.exists() else ()):
        tables.setdefault(row["table"], {})[row["name"]] = row
    return tables


def parsed(lines: Iterable[str]) -> Iterable[Row]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            print(f"skipped a truncated row: {line[:80]}", file=sys.stderr)
