"""The files of a run as it trains: configuration, prompts, metrics, checkpoints and the final table in its folder."""

import dataclasses
from pathlib import Path

from rich.table import Table

from fastnabla.config.train import TrainConfig, to_json
from fastnabla.distributed.world import World
from fastnabla.prompts import RunPrompts
from fastnabla.run.checkpoint import Checkpoints
from fastnabla.run.lock import RunFolderError
from fastnabla.run.record_list import RecordList
from fastnabla.run.records import Records
from fastnabla.run.resuming import check_length, fingerprint
from fastnabla.run.state import Progress, TrainState
from fastnabla.run.table import final_table, markdown
from fastnabla.run.tracker import Tracker
from fastnabla.utils.durable import write_file


class RunFiles:
    """Begins a run in a folder or loads its newest checkpoint, then writes the run's files. Only rank 0 writes, unless weights
    are sharded.

    Args:
        folder: the run folder.
        config, prompts: the run's.
        state: what checkpoints save and restore.
        world: the ranks. Each has its own object, and they save and close together.
        resume: continue from the folder's newest checkpoint.

    Raises:
        CheckpointError: see `fastnabla.run.checkpoint.Checkpoints.load`.
        RunFolderError: the folder already holds a run and `resume` is False; or its run has done more updates than
            `config.updates`.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, prompts: RunPrompts, state: TrainState, world: World, resume: bool
    ) -> None:
        self.folder, self.world, self.samples = folder, world, config.evaluation.samples
        self.checkpoints = Checkpoints(folder, state, fingerprint(config, prompts), config.checkpoint_keep, world)
        self.start = self.checkpoints.load() if resume else Progress()
        """The progress that the run starts from."""
        check_length(self.start.update, config.updates)
        if not resume and world.is_main:
            if (folder / "config.json").exists():
                raise RunFolderError(f"run = {str(folder)!r}: already holds a run; resume it, or name another folder.")
            prompts.save(folder / "prompts.json")
            write_file(folder / "config.json", to_json(config))
        self.tracker = Records()
        if world.is_main:
            self.tracker = Tracker(folder, config.tracker, dataclasses.asdict(config), self.start.update)
        self.tracker.records = RecordList(world.broadcast(lambda: list(self.tracker.records)))

    def save(self, progress: Progress, wait: bool = False) -> None:
        """Save a checkpoint, unless the newest is of this update. It is written in the background.

        Args:
            progress: the run's.
            wait: until it is written.

        Raises:
            CheckpointError: this checkpoint, or the one before it, cannot be written.
        """
        if progress.update > self.checkpoints.saved:
            self.tracker.flush()
            self.checkpoints.save(progress)
        self.record_checkpoints(wait)

    def record_checkpoints(self, wait: bool = False) -> None:
        """Record the time and size of checkpoints written since the last call.

        Args:
            wait: for the one that is being written.

        Raises:
            CheckpointError: it cannot be written.
        """
        for cost in self.checkpoints.written(wait):
            self.tracker.measure("checkpoint", cost.pop("update"), cost)

    def write_table(self) -> Table:
        """Write table.md, the pretrained against the finetuned model. Returns the table."""
        table = final_table(self.tracker.records.of("evaluate"), self.samples)
        if self.world.is_main:
            write_file(self.folder / "table.md", markdown(table))
        return table

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and close all files."""
        self.checkpoints.close()
        self.tracker.close()
