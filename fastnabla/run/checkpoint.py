"""The state of a run between two updates, in folders RUN/checkpoints/update-000010, the newest few of which are kept.

All randomness is a function of the seed and the update, so this is everything: what is trained of the policy, its average, flow
network, optimizer and schedule, the rewards' running statistics, the method's own, the micro-batch that fits into memory, and the
rollouts that are yet to be learned from. A folder appears whole or not at all (`fastnabla.utils.durable`), so a run can be killed at
any instant; what decays on the disk is found out, and the checkpoint before it taken. It is written by a thread, from a
copy: training waits for the copy alone.
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
from torch import Tensor, nn

import fastnabla
from fastnabla.distributed.world import ALONE, World
from fastnabla.methods.accumulation import Accumulation
from fastnabla.models.policy import Policy
from fastnabla.optim.ema import WeightAverage
from fastnabla.optim.optimizer import Optimizer
from fastnabla.rewards import RewardSum
from fastnabla.run import large_tensors
from fastnabla.run.host_copy import host_copy, nbytes
from fastnabla.run.large_tensors import LargeTensors, write_tensors
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.pooled_buffer import PooledBuffer
from fastnabla.utils.durable import DamagedError, partial_folder, remove_folder, verify_folder, write_folder

logger = logging.getLogger("fastnabla")

FOLDER, FILE = "checkpoints", "state.pt"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or of those that were none can be read."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """The parts of a run that updates change."""

    policy: Policy
    flow: nn.Module | None
    optimizer: Optimizer
    reward: RewardSum
    step: Accumulation
    buffer: TrajectoryBuffer | PooledBuffer | None
    """None for a method that stores no trajectories."""
    ema: WeightAverage | None = None

    def state_dict(self) -> dict[str, Any]:
        """All of it but the buffer, which may be empty."""
        return {
            "policy": {name: parameter.detach() for name, parameter in self.policy.trained().items()},
            "flow": self.flow.state_dict() if self.flow is not None else {},
            "optimizer": self.optimizer.algorithm.state_dict(),
            "schedule": self.optimizer.schedule.state_dict(),
            "reward": self.reward.state_dict(),
            "micro_batch": self.step.micro_batch,
            "step": self.step.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what `state_dict` gave, in a run of the same configuration."""
        with self.policy.updating():
            for name, parameter in self.policy.trained().items():
                parameter.copy_(state["policy"][name])
        if self.flow is not None:
            self.flow.load_state_dict(state["flow"])
        self.optimizer.load_state_dict(state["optimizer"], state["schedule"])
        self.reward.load_state_dict(state["reward"])
        self.step.micro_batch = state["micro_batch"]
        self.step.load_state_dict(state["step"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    update: int = 0
    """Updates done."""
    rollouts: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Metrics of the rollouts in the buffer, oldest first."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        run: its folder.
        state: what is saved and restored.
        configuration: what identifies the run's configuration; see `fastnabla.run.resuming.fingerprint`.
        keep: how many are kept.
        world: whose ranks all save and load together. Rank 0 alone writes; and reads, but for what is trained if that is not a
            LoRA: each reads it, and if it is sharded writes its share, on a file system that they have in common.
    """

    def __init__(self, run: Path, state: TrainState, configuration: str, keep: int, world: World = ALONE) -> None:
        self.folder, self.state, self.configuration, self.keep = run / FOLDER, state, configuration, keep
        self.world = world
        self.large = None if state.policy.is_lora else LargeTensors(state.policy, state.optimizer, state.ema)
        self.saved = 0
        """The update that the newest one is of, which may still be being written."""
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[Future[dict[str, float]], float, int] | None = None
        """The newest, seconds that training waited for it, and the update that the one before is of."""
        self._costs: list[dict[str, float]] = []

    def save(self, progress: Progress) -> None:
        """Copy the state as it is now to the host, and write it while training goes on; then remove all but the newest
        `keep`. Waits for the one before. What is sharded is written before this returns, as all processes take part.

        Raises:
            CheckpointError: this one, or the one before, could not be written. Those that were there still are.
        """
        started = time.perf_counter()
        self._collect()
        state = self.state.state_dict() | dataclasses.asdict(progress)
        if progress.rollouts:
            state["buffer"] = self.state.buffer.state_dict()
        state, large = (state, {}) if self.large is None else self.large.take_out(state)
        if self.state.policy.is_sharded:
            self._write_shares(state, large, progress.update, started)
        elif self.world.is_main:
            state, large = host_copy([state, large])
            stall = time.perf_counter() - started
            writing = self._writer.submit(self._write, state, large, progress.update, started)
            self._writing = writing, stall, self.saved
        self.saved = progress.update

    def written(self, wait: bool = False) -> list[dict[str, float]]:
        """What the checkpoints that have been written since the last call took: "update"; "checkpoint_stall_seconds", that
        `save` took; "checkpoint_seconds" from its beginning until it was on the disk; "checkpoint_bytes". Of rank 0 alone.

        Args:
            wait: for the one that is being written.

        Raises:
            CheckpointError: it could not be. Those that were there still are.
        """
        if wait or (self._writing is not None and self._writing[0].done()):
            self._collect()
        costs, self._costs = self._costs, []
        return costs

    def close(self) -> None:
        """Wait for what is being written, whatever comes of it."""
        self._writer.shutdown()

    def _collect(self) -> None:
        if self._writing is not None:
            (writing, stall, before), self._writing = self._writing, None
            try:
                self._costs.append(writing.result() | {"checkpoint_stall_seconds": stall})
            except Exception:
                self.saved = before
                raise

    def _write_shares(self, state: dict[str, Any], large: dict[str, Tensor], update: int, started: float) -> None:
        if self.world.is_main:
            costs = self._write(state, large, update, started)
            self._costs.append(costs | {"checkpoint_stall_seconds": costs["checkpoint_seconds"]})
        else:
            write_tensors(partial_folder(self._folder(update)) / large_tensors.FOLDER, large)
        self.world.barrier()  # else one of the others may end, and with it all, before it is written

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
                f"{_free(self.folder.parent)} are free there. The checkpoints before it are intact: make room, or lower "
                "checkpoint_keep, and resume."
            ) from error
        seconds = time.perf_counter() - started
        present = _all(self.folder)
        # What is numbered higher is damaged, or this run would have gone on from there.
        newest = present[: present.index(folder) + 1][-self.keep :]
        for path in present:
            if path not in newest:
                remove_folder(path)
        return {"update": update, "checkpoint_seconds": seconds, "checkpoint_bytes": size}

    def _folder(self, update: int) -> Path:
        return self.folder / f"update-{update:06d}"

    def load(self) -> Progress:
        """Restore the newest checkpoint that is as it was written; no progress if none was ever saved.

        Damaged ones are passed over with a warning.

        Raises:
            CheckpointError: there are some and all are damaged, or the newest is of another configuration.
        """
        folder = self.world.broadcast(self._newest)
        return Progress() if folder is None else self._restore(self.folder / folder)

    def _newest(self) -> str | None:
        """Name of the folder to restore."""
        newest = newest_checkpoint(self.folder.parent)
        if newest is not None:
            self._check_origin(*newest)
            return newest[0].name
        if (old := self.folder.parent / "checkpoint.pt").exists():
            raise CheckpointError(
                f"the checkpoint {old} is of an earlier version of fastnabla; resume it with that one."
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
                f"the checkpoint {folder} is as it was written, and does not fit this run ({type(error).__name__}: {error}); "
                f"resume it with the fastnabla that wrote it, or start a new run. This is {fastnabla.__version__}."
            ) from error

    def _check_origin(self, folder: Path, manifest: dict[str, Any]) -> None:
        if manifest["configuration"] != self.configuration:
            raise CheckpointError(
                f"the checkpoint {folder}, of fastnabla {manifest['version']}, is of another configuration than this run "
                f"with fastnabla {fastnabla.__version__}: put config.json and prompts.json (and the version) back as they "
                "were, or start a new run. The number of updates may change with optimizer.schedule = 'constant' and "
                "rollout.replay = 0 alone."
            )


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and manifest of the newest checkpoint of the run folder `run` that is as it was written; None if none was
    ever saved. Damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there are some and all are damaged.
    """
    damages = {}
    for folder in reversed(_all(run / FOLDER)):
        try:
            return folder, verify_folder(folder)
        except DamagedError as error:
            logger.warning("the checkpoint %s is damaged and passed over: %s", folder, error)
            damages[folder.name] = error
    if damages:
        found = "; ".join(f"{name}: {error}" for name, error in damages.items())
        raise CheckpointError(
            f"no checkpoint in {run / FOLDER} can be used ({found}). Restore one from a copy, or remove the folder to "
            "start again from the pretrained model."
        )
    return None


def load_reward_statistics(run: Path, reward: RewardSum) -> None:
    """Restore the statistics that `reward` normalises by from the newest checkpoint of the run folder `run`.

    Raises:
        ValueError: there is none that can be read, or it is of other terms.
    """
    try:
        newest = newest_checkpoint(run)
    except CheckpointError as error:
        raise ValueError(f"reward.normalise needs the run's statistics: {error}") from error
    if newest is None:
        raise ValueError(f"reward.normalise needs the run's statistics, and {str(run)!r} has no checkpoint.")
    reward.load_state_dict(torch.load(newest[0] / FILE, map_location="cpu", weights_only=True)["reward"])


def _all(checkpoints: Path) -> list[Path]:
    """Oldest first."""
    folders = [path for path in checkpoints.glob("update-*") if path.name.removeprefix("update-").isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("update-")))


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"
