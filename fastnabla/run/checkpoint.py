"""Checkpoints of a run: its state between two updates, in RUN/checkpoints/update-000010. The newest few are kept.

A checkpoint holds the trained weights of the policy, their average, the flow network, optimizer and schedule, the rewards'
running statistics, the state of the method's step, the micro-batch that fits into memory, and the rollouts that are still to
be learned from. No random state is saved: all randomness is a function of the seed and the update.

A folder appears whole or not at all (`fastnabla.utils.durable`), so a run can be killed at any instant. A corrupt checkpoint
is detected and the previous one is loaded. A thread writes the checkpoint from a copy on the host; training waits only for
the copy.
"""

import dataclasses
import io
import logging
import pickle
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastnabla
from fastnabla.distributed.world import ALONE, World
from fastnabla.rewards import RewardSum
from fastnabla.run import large_tensors
from fastnabla.run.host_copy import host_copy, nbytes
from fastnabla.run.large_tensors import LargeTensors, write_tensors
from fastnabla.run.state import Progress, TrainState
from fastnabla.utils.durable import DamagedError, partial_folder, remove_folder, verify_folder, write_folder

logger = logging.getLogger("fastnabla")

FOLDER, FILE = "checkpoints", "state.pt"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none of the existing ones can be read."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        run: its folder.
        state: saved and restored.
        configuration: identifies the run's configuration; see `fastnabla.run.resuming.fingerprint`.
        keep: number of checkpoints kept.
        world: the ranks. They save and load together. Only rank 0 reads and writes, with one exception: in full finetuning each
            rank reads the trained weights, and writes its shard of them if they are sharded, on a shared file system.
    """

    def __init__(self, run: Path, state: TrainState, configuration: str, keep: int, world: World = ALONE) -> None:
        self.folder, self.state, self.configuration, self.keep = run / FOLDER, state, configuration, keep
        self.world = world
        self.large = None if state.policy.is_lora else LargeTensors(state.policy, state.optimizer, state.ema)
        self.saved = 0
        """Update of the newest checkpoint, which may still be being written."""
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[Future[dict[str, float]], float, int] | None = None
        """The checkpoint being written, the seconds that training waited for it, and the update of the previous one."""
        self._costs: list[dict[str, float]] = []

    def save(self, progress: Progress) -> None:
        """Copy the current state to the host and write it in the background; then remove all but the newest `keep`.

        Waits until the previous checkpoint is written. Sharded weights are written before this returns, by all processes.

        Raises:
            CheckpointError: this checkpoint, or the previous one, could not be written. Older ones are intact.
        """
        started = time.perf_counter()
        self._collect()
        state = self.state.state_dict() | dataclasses.asdict(progress)
        if progress.rollouts:
            state["buffer"] = self.state.buffer.state_dict()
        state, large = (state, {}) if self.large is None else self.large.take_out(state)
        if self.state.policy.is_sharded:
            self._write_sharded(state, large, progress.update, started)
        elif self.world.is_main:
            state, large = host_copy([state, large])
            stall = time.perf_counter() - started
            writing = self._writer.submit(self._write, state, large, progress.update, started)
            self._writing = writing, stall, self.saved
        self.saved = progress.update

    def written(self, wait: bool = False) -> list[dict[str, float]]:
        """Costs of the checkpoints written since the last call; on rank 0 only.

        Args:
            wait: for the one that is being written.

        Returns:
            For each: "update"; "checkpoint_stall_seconds", how long `save` took; "checkpoint_seconds", from the start of `save`
            until it was on the disk; and "checkpoint_bytes".

        Raises:
            CheckpointError: a checkpoint could not be written. Older ones are intact.
        """
        if wait or (self._writing is not None and self._writing[0].done()):
            self._collect()
        costs, self._costs = self._costs, []
        return costs

    def close(self) -> None:
        """Wait until nothing is being written. Errors in writing are ignored."""
        self._writer.shutdown()

    def _collect(self) -> None:
        if self._writing is not None:
            (writing, stall, before), self._writing = self._writing, None
            try:
                self._costs.append(writing.result() | {"checkpoint_stall_seconds": stall})
            except Exception:
                self.saved = before
                raise

    def _write_sharded(self, state: dict[str, Any], large: dict[str, Tensor], update: int, started: float) -> None:
        if self.world.is_main:
            costs = self._write(state, large, update, started)
            self._costs.append(costs | {"checkpoint_stall_seconds": costs["checkpoint_seconds"]})
        else:
            write_tensors(partial_folder(self._folder(update)) / large_tensors.FOLDER, large)
        self.world.barrier()  # otherwise another rank could end the run before the checkpoint is written

    def _write(self, state: dict[str, Any], large: dict[str, Tensor], update: int, started: float) -> dict[str, float]:
        folder, size = self._folder(update), nbytes([state, large])
        facts = {"update": update, "version": fastnabla.__version__, "configuration": self.configuration}

        def fill(partial: Path) -> None:
            write_tensors(partial / large_tensors.FOLDER, large)

        try:
            write_folder(folder, {FILE: lambda file: torch.save(state, file)}, facts, fill if large else None)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {folder} cannot be written: {error.strerror or error}. It needs {size:,} bytes, and "
                f"{_free(self.folder.parent)} are free there. Older checkpoints are intact. Free some space or lower "
                "checkpoint_keep, and resume."
            ) from error
        seconds = time.perf_counter() - started
        present = _all(self.folder)
        # Checkpoints with higher numbers are damaged; otherwise this run would have continued from them.
        newest = present[: present.index(folder) + 1][-self.keep :]
        for path in present:
            if path not in newest:
                remove_folder(path)
        return {"update": update, "checkpoint_seconds": seconds, "checkpoint_bytes": size}

    def _folder(self, update: int) -> Path:
        return self.folder / f"update-{update:06d}"

    def load(self) -> Progress:
        """Restore the newest intact checkpoint. Damaged ones are skipped with a warning.

        Returns:
            Its progress; that of a new run if there are no checkpoints.

        Raises:
            CheckpointError: all checkpoints are damaged, or the newest belongs to another configuration.
        """
        folder = self.world.broadcast(self._newest)
        return Progress() if folder is None else self._restore(self.folder / folder)

    def _newest(self) -> str | None:
        """Name of the folder to restore; None if there are no checkpoints."""
        newest = newest_checkpoint(self.folder.parent)
        if newest is not None:
            self._check_origin(*newest)
            return newest[0].name
        if (old := self.folder.parent / "checkpoint.pt").exists():
            raise CheckpointError(
                f"the checkpoint {old} was written by an earlier version of fastnabla; resume with that version."
            )
        return None

    def _restore(self, folder: Path) -> Progress:
        device = next(iter(self.state.policy.trained().values())).device
        file = folder / FILE
        if self.world.size > 1:
            file = io.BytesIO(self.world.broadcast_bytes(file.read_bytes))
        try:
            state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
            if self.large is not None:
                state = self.large.put_back(state, folder / large_tensors.FOLDER)
            self.state.load_state_dict(state)
            if "buffer" in state:
                self.state.buffer.load_state_dict(state["buffer"])
            self.saved = state["update"]
            return Progress(state["update"], state["rollouts"])
        except (KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"the checkpoint {folder} is intact but does not fit this run ({type(error).__name__}: {error}). Resume with "
                f"the version of fastnabla that wrote it, or start a new run. This is {fastnabla.__version__}."
            ) from error

    def _check_origin(self, folder: Path, manifest: dict[str, Any]) -> None:
        if manifest["configuration"] != self.configuration:
            raise CheckpointError(
                f"the checkpoint {folder}, written by fastnabla {manifest['version']}, belongs to another configuration than "
                f"this run with fastnabla {fastnabla.__version__}. Restore config.json and prompts.json (and the version), or "
                "start a new run. The number of updates may change only with optimizer.schedule = 'constant' and "
                "rollout.replay = 0."
            )


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and manifest of the newest intact checkpoint in the run folder `run`; None if there are no checkpoints. Damaged
    ones are skipped with a warning.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    damages = {}
    for folder in reversed(_all(run / FOLDER)):
        try:
            return folder, verify_folder(folder)
        except DamagedError as error:
            logger.warning("the checkpoint %s is damaged and is skipped: %s", folder, error)
            damages[folder.name] = error
    if damages:
        found = "; ".join(f"{name}: {error}" for name, error in damages.items())
        raise CheckpointError(
            f"no checkpoint in {run / FOLDER} can be used ({found}). Restore one from a copy, or remove the folder to start "
            "over from the pretrained model."
        )
    return None


def load_reward_statistics(run: Path, reward: RewardSum) -> None:
    """Restore the statistics that normalise `reward` from the newest checkpoint in the run folder `run`.

    Raises:
        ValueError: no checkpoint can be read, or it belongs to other reward terms.
    """
    try:
        newest = newest_checkpoint(run)
    except CheckpointError as error:
        raise ValueError(f"reward.normalise needs the run's statistics: {error}") from error
    if newest is None:
        raise ValueError(f"reward.normalise needs the run's statistics, but {str(run)!r} has no checkpoint.")
    reward.load_state_dict(torch.load(newest[0] / FILE, map_location="cpu", weights_only=True)["reward"])


def _all(checkpoints: Path) -> list[Path]:
    """Folders of all checkpoints, oldest first."""
    folders = [path for path in checkpoints.glob("update-*") if path.name.removeprefix("update-").isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("update-")))


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"
