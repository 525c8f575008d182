"""Writes the policy's weights into the run folder."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fastnabla.models.policy import Policy
from fastnabla.models.saved_policy import save_policy
from fastnabla.optim.ema import WeightAverage
from fastnabla.run.weights import AVERAGE, BEST
from fastnabla.utils.durable import move_files


def write_weights(run: Path, policy: Policy, ema: WeightAverage | None, best: bool, is_main: bool) -> None:
    """Write the policy's weights into the run folder. Files are moved into place once all are written. Collective if sharded.

    Args:
        run: a run folder.
        policy: whose trained weights are written.
        ema: their average, written too; None if the run has none.
        best: write them as the best evaluation's too.
        is_main: whether this is rank 0, which writes the files.

    Raises:
        OSError: the files cannot be written. Those of the last evaluation stay.
    """
    partial = run / ".weights.partial"
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    with _system_errors(partial):
        save_policy(policy, partial, policy.dtype, is_main)
    if best and is_main:
        for path in [path for path in partial.rglob("*") if path.is_file()]:  # copytree hides what the system reports
            copy = partial / BEST / path.relative_to(partial)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    if ema is not None:
        with ema.applied(), _system_errors(partial):
            save_policy(policy, partial / AVERAGE, policy.dtype, is_main)
    if is_main:
        move_files(partial, run)


@contextlib.contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    """Within the context, safetensors raises what the system reports, and not an error of its own."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(folder)) from error
