"""Writes a run's metrics to metrics.jsonl, timing.jsonl, and TensorBoard or Weights & Biases.

`metrics.jsonl` holds only what the seed determines: on a CPU, or with `--deterministic`, two equal runs write equal files.
Clock times and measurements of the machine go to `timing.jsonl`.
"""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastnabla.run.record_list import EXACT, RecordList
from fastnabla.run.records import Records, finite
from fastnabla.run.wandb_run import wandb_run_id
from fastnabla.utils.durable import write_file
from fastnabla.utils.printable import printable

logger = logging.getLogger("fastnabla")


def read_records(path: Path, update: int) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines file up to `update`. Later ones are removed from the file.

    A truncated last line is removed. Any other line that cannot be read is removed with a warning.
    """
    if not path.exists():
        return []
    lines, records = path.read_text(encoding="utf-8", errors="replace").split("\n"), []
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            record = _checked(json.loads(line))
            if record["update"] <= update:
                records.append(record)
        except (ValueError, RecursionError):
            if number < len(lines):
                logger.warning("line %d of %s cannot be read and is removed", number, path)
    write_file(path, "".join(_line(record) for record in records))
    return records


def readable_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines file that another process may be writing. Lines that cannot be read are left out; a missing
    file has no records."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            records.append(_checked(json.loads(line)))
    return records


def _checked(record: Any) -> dict[str, Any]:
    """Check that `record` has a phase, an update, and numbers. Those that are not finite become None."""
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("phase"), str)
        or type(record.get("update")) is not int
    ):
        raise ValueError("not a record")
    if not all(_is_number(value) for name, value in record.items() if name != "phase"):
        raise ValueError("not numbers")
    return finite(record)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) <= EXACT)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def tracker_keys(names: Iterable[str]) -> dict[str, str]:
    """Unique names of metrics made of letters, digits, `_` and `/`, as TensorBoard and Weights & Biases accept them.

    A reward's name may have other characters (module:function), which TensorBoard replaces and W&B cannot plot.
    """
    keys: dict[str, str] = {}
    for name in names:
        key = re.sub(r"[^A-Za-z0-9_/]", "_", name)
        while key in keys.values():
            key += "_"
        keys[name] = key
    return keys


class Tracker(Records):
    """`Records` that are also written to files, and to TensorBoard or Weights & Biases.

    Args:
        folder: the run folder.
        kind: "tensorboard", "wandb" or "none".
        config: the run's configuration, for W&B.
        update: the update that the run continues from. Records of later updates are removed from the files.
    """

    def __init__(self, folder: Path, kind: str, config: dict[str, Any], update: int = 0) -> None:
        self.folder, self.records = folder, RecordList(read_records(folder / "metrics.jsonl", update))
        read_records(folder / "timing.jsonl", update)
        self.started = time.perf_counter()
        self._board = self._wandb = None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1 if update else None)
        elif kind == "wandb":
            import wandb

            # Otherwise W&B uploads the script and uncommitted changes in the working tree.
            settings = {"disable_git": True, "disable_code": True}
            same = {"id": wandb_run_id(folder), "resume": "allow"}  # starts a run if W&B does not know the id
            self._wandb = wandb.init(
                dir=str(folder), config=config, name=printable(folder.name), settings=settings, **same
            )

    def log(self, phase: str, update: int, metrics: dict[str, float], measured: dict[str, float] | None = None) -> None:
        """See `Records.log`. Writes the record; `measured` goes to timing.jsonl, and to TensorBoard and W&B as "gpu/…"."""
        super().log(phase, update, metrics)
        measured = measured or {}
        self._append("metrics.jsonl", self.records[-1])
        self.measure(phase, update, measured)
        values = {f"{phase}/{name}": value for name, value in metrics.items()}
        values |= {f"gpu/{name}": value for name, value in measured.items()}
        keys = tracker_keys(values)
        values = {keys[name]: value for name, value in values.items()}
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, update)
        if self._wandb:
            self._wandb.log(values, step=update)

    def measure(self, phase: str, update: int, measured: dict[str, float]) -> None:
        """Append measured values of a phase to `timing.jsonl` only."""
        seconds = time.perf_counter() - self.started
        self._append("timing.jsonl", finite({"phase": phase, "update": update, "seconds": seconds, **measured}))

    def flush(self) -> None:
        """Flush `metrics.jsonl` to the disk. Records must be on the disk before the checkpoint that follows them."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            os.fsync(file.fileno())

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def close(self) -> None:
        """Flush and close the trackers."""
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()
