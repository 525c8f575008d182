"""The training loop: collect trajectories, update on them, evaluate, save. Every rank runs it."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from torch import Tensor

from fastnabla.config.train import TrainConfig
from fastnabla.distributed.beacon import BEACON
from fastnabla.distributed.signals import Stopped, StopSignals
from fastnabla.distributed.world import ALONE, World
from fastnabla.methods.accumulation import StepReport
from fastnabla.prompts import RunPrompts
from fastnabla.run.files import RunFiles
from fastnabla.run.lock import locked
from fastnabla.run.meter import GpuMeter
from fastnabla.run.pictures import save_pictures
from fastnabla.run.record_list import RecordList
from fastnabla.run.save_weights import write_weights
from fastnabla.run.state import Progress
from fastnabla.run.table import decimals
from fastnabla.run.weights import is_best
from fastnabla.training.build import Components, fix_rows, plan_and_build
from fastnabla.training.guards import BoundPassed, Guard, passed_bound, warn_of_learning_rate
from fastnabla.training.progress import progress_display
from fastnabla.trajectories.sources import learning_order


class Trainer:
    """Trains the components of a run.

    It alternates between collecting the trajectories of one rollout and making `updates_per_rollout` updates on them.

    Args:
        components: see `fastnabla.training.build.build_components`.
    """

    def __init__(self, components: Components) -> None:
        self.components = components
        self.config, self.world, self.prompts = components.config, components.world, components.prompts
        self.policy, self.table = components.policy, components.table
        self.source, self.slots, self.sampler = components.source, components.slots, components.sampler
        self.step, self.optimizer, self.ema = components.step, components.optimizer, components.ema
        self.evaluator, self.anomalies = components.evaluator, components.anomalies
        self.updates_per_rollout = self.config.rollout.updates_per_rollout
        self.done = 0
        """Updates done."""
        warn_of_learning_rate(self.config)

    @classmethod
    def from_config(cls, config: TrainConfig, prompts: RunPrompts | None = None, world: World = ALONE) -> Self:
        """A trainer of the run `config`, whose memory settings are planned first.

        Args:
            config, prompts, world: see `fastnabla.training.build.build_components`.

        Raises:
            ValueError: see `fastnabla.training.build.plan_and_build`.
        """
        return cls(plan_and_build(config, prompts, world))

    def train(
        self, folder: Path, console: Console | None = None, resume: bool = False, stop: StopSignals | None = None
    ) -> Sequence[dict[str, Any]]:
        """Train to the last update and write everything into the run folder; returns the metric records.

        Args:
            folder: an empty folder, or with `resume` that of an interrupted run of the same configuration.
            console: where progress is shown; None for silence.
            resume: continue from the folder's newest checkpoint.
            stop: signals that may ask the run to stop.

        Raises:
            Stopped: a signal asked the run to stop. Its state is saved.
            BoundPassed: an evaluation passed a bound of `config.evaluation`. The state is saved.
            CheckpointError: a checkpoint cannot be written, or none can be read.
            FloatingPointError: more than `max_skipped` updates in a row were not finite.
            RewardError: a reward fails.
            RunFolderError: another process writes into the folder; or the folder already has a run and `resume` is False;
                or its run has done more updates than `config.updates`.
            ZeroGradientError: an update's gradient is zero where it must not be.
        """
        console = console or Console(quiet=True)
        with locked(folder) if self.world.is_main else contextlib.nullcontext():
            self._open(folder, console, resume, stop or StopSignals())
            try:
                with self.progress, self.world.hang_limit(self.config.hang_timeout):
                    bound = self.run()
            except Stopped:
                self.save(wait=True)
                raise
            finally:
                self.files.close()
                self.meter.close()
            console.print(self.files.write_table())
        if bound is not None:
            raise BoundPassed(bound)
        return self.tracker.records

    def run(self) -> str | None:
        """The loop. Returns the bound that an evaluation passed, which ends the run; None after the last update.

        A resumed run enters it where it was stopped: before collecting a rollout, or between two updates on one.
        """
        config = self.config
        self.sample_pretrained()
        while True:
            # Evaluate.
            if self._is_due(config.evaluation.every) and not self.tracker.has("evaluate", self.done):
                self.evaluate()

            # Save.
            bound = passed_bound(config.evaluation, self.tracker.records.of("evaluate"))
            last = bound is not None or self.done == config.updates
            if last or self._is_due(config.checkpoint_every):
                self.save(wait=last)
            if last:
                return bound

            # Collect trajectories. After a resume between two updates they are in the buffer already.
            rollout = self.collect()

            # Update.
            for place in range(self.done % self.updates_per_rollout, self.updates_per_rollout):
                self.stop.check(self.world)
                self.update(rollout, place)
            self.source.finish()

    def sample_pretrained(self) -> None:
        """Sample the pretrained model, which later evaluations are compared with, and record its metrics as update 0."""
        self.progress.begin("pretrained samples", 2 * len(self.evaluator.rank_rows) * len(self.table))
        with self.policy.whole_reference(), self.policy.pretrained_weights():
            self.pretrained, prior = self.evaluator.images(), self.evaluator.images(noise=1)
        if self.world.is_main:
            self.evaluator.set_prior(prior)
        self.tracker.measure("start", self.done, {})
        if not self.tracker.has("evaluate", 0):
            metrics = self.world.broadcast(lambda: self.evaluator.measure(self.pretrained))
            self.tracker.log("evaluate", 0, metrics, self.meter.read(0))
        self.meter.read(0)  # an update's energy counts from here

    def collect(self) -> dict[str, float]:
        """Collect the trajectories that the next updates learn from. Returns their rollout's metrics."""
        self.progress.begin("rollout", len(self.slots) * len(self.table))
        return self.source.collect(self.done // self.updates_per_rollout)

    def update(self, rollout: dict[str, float], place: int) -> None:
        """Make one optimizer update and record it.

        Args:
            rollout: metrics of the rollout that it learns from.
            place: number of the update among those of the rollout, from 0.
        """
        config = self.config
        self.progress.begin("step", 1)

        # Select this rank's trajectories.
        rollout_index = self.done // self.updates_per_rollout
        numbers = learning_order(config.seed, rollout_index, config.rollout)[place]
        numbers = numbers[torch.isin(numbers, self.slots)]
        selection = self.source.select(rollout_index, numbers, again=place >= config.rollout.updates)
        self.policy.conditions.ensure(selection.prompt)

        # Compute the gradients and sum them over ranks.
        before = self.anomalies.before() if config.dump_anomalies else {}
        self.step.update = self.done
        report = self.step(selection)
        self.world.sum_([parameter.grad for parameter in self.step.replicated])

        # Update the weights, unless something is not finite.
        self.done += 1
        with self.policy.updating():
            norms = self.optimizer.update(functools.partial(self.guard.accepts, self.done, report))
        if not self.guard.skipped:
            self.step.after_update()
            if self.ema is not None:
                self.ema.update()
        self.progress.advance()

        # Record.
        metrics = _metrics(report, rollout, norms) | {"skipped": int(self.guard.skipped > 0)}
        if place == 0 and config.rollout.replay == 0 and "trust" in report.rows:
            # The policy is still the one that sampled, so this is rounding.
            metrics["trust_floor"] = report.rows["trust"].mean().item()
        metrics["spikes"] = self.guard.count_spikes(self.done, metrics, self.tracker.records, report)
        self.tracker.log("train", self.done, metrics, self.meter.read(len(selection)))
        if config.dump_anomalies and self.guard.skipped:
            self.anomalies.write(self.folder, self.done, selection, before, config, self.prompts)
        self.guard.check(self.done)
        self.files.record_checkpoints()
        self.progress.show_update(self.done, metrics)

    def evaluate(self) -> None:
        """Measure the policy, and write pictures and weights. The record comes last: it marks the evaluation as complete."""
        models = 1 if self.ema is None else 2
        self.progress.begin("evaluation", models * len(self.evaluator.rank_rows) * len(self.table))
        images = self.evaluator.images()
        columns = {"pretrained": self.pretrained, f"after {self.done} updates, same noise": images}
        metrics = self.world.broadcast(lambda: self.evaluator.measure(images))
        if self.ema is not None:
            with self.ema.applied():
                columns["averaged weights, same noise"] = averaged = self.evaluator.images()
            ema_metrics = self.world.broadcast(lambda: self.evaluator.measure(averaged))
            metrics |= {f"ema_{name}": value for name, value in ema_metrics.items()}
        if self.world.is_main:
            record = {"phase": "evaluate", "update": self.done, **metrics}
            records = RecordList(self.tracker.records)
            records.append(record)
            self._write_pictures(records, columns)
        best = is_best(metrics["reward"], self.tracker.records.of("evaluate"))
        with BEACON.excused():
            write_weights(self.folder, self.policy, self.ema, best, self.world.is_main)
        self.tracker.log("evaluate", self.done, metrics, self.meter.read(0))
        self.progress.show_evaluation(self.done, decimals(self.tracker.records[-1]["reward"]))

    def save(self, wait: bool = False) -> None:
        """Save a checkpoint in the background, unless the newest is of this update.

        Args:
            wait: until it is written.
        """
        with BEACON.excused():
            self.files.save(Progress(self.done, self.source.rollouts), wait)

    def _open(self, folder: Path, console: Console, resume: bool, stop: StopSignals) -> None:
        """Open the run folder, and continue from its newest checkpoint if `resume`."""
        config, components = self.config, self.components
        self.folder, self.stop = folder, stop
        self.files = RunFiles(folder, config, self.prompts, components.state, self.world, resume)
        self.tracker = self.files.tracker
        self.done = self.files.start.update
        self.source.rollouts[:] = self.files.start.rollouts
        fix_rows(config, self.policy, self.step, self.world)  # the checkpoint's micro-batch may be smaller
        self.guard = Guard(
            self.prompts.texts,
            self.table.timestep,
            max_skipped=config.max_skipped,
            skipped=self.tracker.last_in_a_row("skipped"),
            clips=config.reward.clip is not None,
            spike_factor=config.spike_factor,
        )
        self.progress = progress_display(console, config.updates, self.done)
        self.sampler.stop, self.sampler.advance = stop, self._on_step
        self.meter = GpuMeter(components.device)
        self.meter.start()

    def _on_step(self, steps: int) -> None:
        """Called by the sampler with the number of trajectories after each of their steps. Raises `Stopped` after a signal."""
        self.progress.advance(steps)
        self.stop.check()

    def _is_due(self, every: int) -> bool:
        """Whether something done after every `every` updates (0: only after the last) is due now. It is never due between two
        updates on the same rollout."""
        if self.done == 0 or self.done % self.updates_per_rollout:
            return False
        return self.done == self.config.updates or (
            every > 0 and self.done // every > (self.done - self.updates_per_rollout) // every
        )

    def _write_pictures(self, records: Sequence[dict[str, Any]], columns: dict[str, Tensor]) -> None:
        prompts = self.evaluator.prompts[:: self.config.evaluation.samples]
        save_pictures(self.folder, records, columns, prompts)


def _metrics(report: StepReport, rollout: dict[str, float], norms: dict[str, Tensor]) -> dict[str, float]:
    """An update's metrics by name. Waits for the device."""
    metrics = dict(rollout)
    metrics |= {"loss" if name == "loss" else f"loss_{name}": value.item() for name, value in report.losses.items()}
    metrics |= {name: value.item() for name, value in report.statistics.items()}
    metrics |= {f"rows_{kind}": count for kind, count in report.counts.items()}
    metrics |= {f"passes_{kind}": value for kind, value in report.passes.items()}
    return metrics | {name: value.item() for name, value in norms.items()}
