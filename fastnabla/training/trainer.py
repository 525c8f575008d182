"""The training loop: rollout → updates → evaluation → checkpoint, straight down; on every rank."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastnabla.config.methods import METHODS
from fastnabla.config.train import TrainConfig, to_json
from fastnabla.cost.planner import planned
from fastnabla.debug.anomaly import Anomalies
from fastnabla.distributed.devices import device_of
from fastnabla.distributed.signals import Stopped, StopSignals
from fastnabla.distributed.world import ALONE, World
from fastnabla.methods.accumulation import StepReport
from fastnabla.methods.registry import STEPS
from fastnabla.metrics.evaluation import Evaluator
from fastnabla.metrics.probes import build_probe
from fastnabla.models.build import build_networks
from fastnabla.models.compiling import compile_cost
from fastnabla.models.pipeline import image_size, pipeline_of, tokenizers
from fastnabla.models.saved_policy import save_policy
from fastnabla.optim.ema import WeightAverage
from fastnabla.optim.optimizer import Optimizer
from fastnabla.prompts import RunPrompts, used_prompts, warn_truncated
from fastnabla.rewards import check_reward
from fastnabla.run.checkpoint import Checkpoints, Progress, TrainState
from fastnabla.run.lock import RunFolderError, locked
from fastnabla.run.meter import GpuMeter
from fastnabla.run.pictures import save_curves, save_grid
from fastnabla.run.records import Records
from fastnabla.run.resuming import check_length, fingerprint
from fastnabla.run.table import decimals, final_table, markdown
from fastnabla.run.tracker import Tracker
from fastnabla.run.weights import AVERAGE, BEST, is_best
from fastnabla.training.bounds import BoundPassed, passed_bound, require_measurable
from fastnabla.training.guards import Guard
from fastnabla.training.inputs import prompts_of, reward_of
from fastnabla.training.spikes import count_spikes
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.collection import RolloutCollector, Sampler, rank_ranges
from fastnabla.trajectories.pooled_buffer import PooledBuffer
from fastnabla.trajectories.sources import Source, StoredTrajectories, UnsampledTrajectories, learning_order
from fastnabla.utils.console import progress_bar
from fastnabla.utils.determinism import make_deterministic
from fastnabla.utils.durable import move_files, write_file
from fastnabla.utils.require import require
from fastnabla.utils.seeding import seed_of


class Trainer:
    """Everything a run consists of, built from its configuration.

    Building it checks all input (prompts, model, sampler, reward, probe) and does no work yet.

    Args:
        config: the run's.
        prompts: an interrupted run's, from its folder; None to load those that `config` names.
        world: the ranks that train together; each builds its own.

    Raises:
        ValueError: something in the configuration is wrong; the message names the field and a remedy.
    """

    def __init__(self, config: TrainConfig, prompts: RunPrompts | None = None, world: World = ALONE) -> None:
        if config.deterministic:
            make_deterministic()
        self.device, self.world = device_of(config, world.rank_info), world
        parts = rank_ranges(world, config.rollout.trajectories, config.rollout.updates)
        for field, alone in (("replay", 0), ("epochs", 1)):
            value = getattr(config.rollout, field)
            remedy = f"several processes learn from their newest rollout, once: use {alone}, or one process."
            require(world.size == 1 or value == alone, f"rollout.{field}", value, remedy)
        self.config = config = planned(config, self.device, world.local_size, world.size)[0]
        if config.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ValueError("tracker = 'wandb': the package is not installed; run: pip install wandb")
        self.prompts = prompts or RunPrompts.from_json(world.broadcast(lambda: prompts_of(config).to_json()))
        self.reward = reward_of(config.reward, config.model.random_init, self.device)
        self.probe = build_probe(config.evaluation.probe, self.device)
        require_measurable(config.evaluation, self.probe)
        require(
            not (config.dump_anomalies and config.is_sharded(world.size)),
            "dump_anomalies",
            config.dump_anomalies,
            f"the weights are split over {world.size} processes, and an update's folder has them all; leave it False, or use "
            "--memory.shard False.",
        )

        pipeline = pipeline_of(config.model)
        check_reward(self.reward, self.prompts.texts, image_size(pipeline), self.device)
        used = used_prompts(self.prompts, config.seed, config.sampled_trajectories, config.prompts.draw).tolist()
        warn_truncated([self.prompts.texts[i] for i in used], *tokenizers(pipeline))
        networks = build_networks(pipeline, self.prompts, config, self.device, world)
        self.policy, self.flow, self.decoder = networks.policy, networks.flow, networks.decoder
        self.table, self.sample_shape = networks.table, networks.sample_shape
        method = METHODS[config.method]
        self.step = STEPS[config.method].build(config, networks, self.reward, self.prompts.texts)
        self.step.world = world
        self._fix_rows()
        self.sampler = Sampler(config, self.policy, self.table, self.sample_shape, world)
        self.buffer: TrajectoryBuffer | None = None
        if method.stores:
            self.buffer = TrajectoryBuffer(
                sum(map(len, parts)) * (1 + config.rollout.replay),
                len(self.table),
                config.drawn_steps + 1,
                self.sample_shape,
                device=self.device,
                storage=config.memory.buffer,
                output_block=config.memory.output_block,
            )
        self.slots = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        """Numbers of this rank's trajectories of a rollout."""
        count, draw = config.rollout.trajectories, config.prompts.draw
        self.source: Source = UnsampledTrajectories(config.seed, count, self.prompts.trained, draw)
        if self.buffer is not None:
            if config.rollout.epochs > 1 and method.has_reference:
                self.buffer.keep_reference(with_product=config.has_flow and config.objective.reverse_weight > 0)
            rollouts = RolloutCollector(self.sampler, self.decoder, self.reward, self.prompts, self.buffer, self.slots)
            settings = (self.slots, config.rounds, config.rollout.replay)
            self.source = StoredTrajectories(rollouts, self.buffer, *settings)
        self.optimizer = Optimizer(self.policy, self.flow, config.optimizer, config.flow, config.updates)
        decay = config.optimizer.ema
        self.ema = None if decay is None else WeightAverage(self.policy.trained(), decay, self.policy.updating)
        self.evaluator = Evaluator(
            self._evaluation_sample,
            self.decoder,
            self.reward,
            self.probe,
            [self.prompts.texts[i] for i in self.prompts.evaluated],
            config.evaluation.samples,
            config.memory.decode_chunk,
            world,
        )

    def train(
        self, run: Path, console: Console | None = None, resume: bool = False, stop: StopSignals | None = None
    ) -> list[dict[str, Any]]:
        """Run to the end, writing everything into the folder `run`; the metric records.

        Args:
            run: an empty folder, or with `resume` that of an interrupted run of the same configuration.
            console: where progress goes; None for silence.
            resume: continue from the folder's newest checkpoint.
            stop: what may ask the run to stop between updates.

        Raises:
            Stopped: it was asked to, and the state is saved.
            BoundPassed: an evaluation found more lost than `config.evaluation` allows; all is saved.
            CheckpointError: a checkpoint cannot be written, or none can be read.
            FloatingPointError: more updates than allowed were not finite.
            RewardError: a reward fails.
            RunFolderError: another process writes into the folder; without `resume`, a run was begun there; with it, the
                run has done more updates than it should have.
            ZeroGradientError: an update's gradient is zero where it must not be.
        """
        with locked(run) if self.world.is_main else contextlib.nullcontext():
            return self._train(run, console or Console(quiet=True), resume, stop or StopSignals())

    def _train(self, run: Path, console: Console, resume: bool, stop: StopSignals) -> list[dict[str, Any]]:
        config, evaluator, world = self.config, self.evaluator, self.world
        self.sampler.stop = stop
        buffer = self.buffer
        if buffer is not None and world.size > 1:
            buffer = PooledBuffer(buffer, world, self.slots, config.rollout.trajectories)
        state = TrainState(
            policy=self.policy,
            flow=self.flow,
            optimizer=self.optimizer,
            reward=self.reward,
            step=self.step,
            buffer=buffer,
            ema=self.ema,
        )
        checkpoints = Checkpoints(run, state, fingerprint(config, self.prompts), config.checkpoint_keep, world)
        done = checkpoints.load() if resume else Progress()
        self._fix_rows()  # the micro-batch may have been halved
        update, rollout = done.update, done.rollout
        check_length(update, config.updates)
        self.source.rollouts[:] = done.rollouts
        if not resume and world.is_main:
            if (run / "config.json").exists():
                raise RunFolderError(f"run = {str(run)!r}: a run was begun there; resume it, or name another folder.")
            self.prompts.save(run / "prompts.json")
            write_file(run / "config.json", to_json(config))
        tracker = Tracker(run, config.tracker, dataclasses.asdict(config), update) if world.is_main else Records()
        tracker.records = world.broadcast(lambda: tracker.records)
        in_a_row, clips = tracker.last_in_a_row("skipped"), config.reward.clip is not None
        guard = Guard(self.prompts.texts, self.table.timestep, config.max_skipped, in_a_row, clips)
        anomalies = Anomalies(policy=self.policy, flow=self.flow, reward=self.reward, step=self.step)
        meter = GpuMeter(self.device)
        meter.start()

        def save() -> None:
            tracker.flush()
            checkpoints.save(Progress(update, rollout, self.source.rollouts))

        def note_written(wait: bool = False) -> None:
            for cost in checkpoints.written(wait):
                tracker.measure("checkpoint", cost.pop("update"), cost)

        try:
            with progress_bar(console) as progress:
                overall = progress.add_task("updates", total=config.updates, completed=update, status="")
                phase = progress.add_task("", total=1, status="")

                def begin(description: str, total: int) -> None:
                    progress.reset(phase, description=description, total=total)

                def advance(count: int) -> None:
                    progress.advance(phase, count)
                    stop.check()

                self.sampler.advance = advance
                begin("pretrained samples", 2 * len(evaluator.rank_rows) * len(self.table))
                with self.policy.whole_reference(), self.policy.pretrained_weights():
                    before, prior = evaluator.images(), evaluator.images(noise=1)
                if world.is_main:
                    evaluator.set_prior(prior)
                tracker.measure("start", update, {})
                if not tracker.has("evaluate", 0):
                    tracker.log("evaluate", 0, world.broadcast(lambda: evaluator.measure(before)), meter.read(0))

                meter.read(0)
                while True:
                    if rollout is None and update > 0:
                        if self._due(update, config.evaluation.every) and not tracker.has("evaluate", update):
                            models = 1 if self.ema is None else 2
                            begin("evaluation", models * len(evaluator.rank_rows) * len(self.table))
                            self._evaluate(run, tracker, update, before, meter)
                            progress.update(
                                overall, status=f"evaluated reward {decimals(tracker.records[-1]['reward'])}"
                            )
                        passed = passed_bound(config.evaluation, tracker.records)
                        due = passed or self._due(update, config.checkpoint_every)
                        if due and update > checkpoints.saved:
                            save()
                        if passed or update == config.updates:
                            note_written(wait=True)
                            break
                    rollout_index, place = divmod(update, config.rollout.updates_per_round)
                    if rollout is None:
                        begin("rollout", len(self.slots) * len(self.table))
                        rollout = self.source.collect(rollout_index)
                    stop.check(world)
                    begin("step", 1)
                    numbers = learning_order(config.seed, rollout_index, config.rollout)[place]
                    numbers = numbers[torch.isin(numbers, self.slots)]
                    selection = self.source.select(rollout_index, numbers, again=place >= config.rollout.updates)
                    remembered = anomalies.before() if config.dump_anomalies else {}
                    self.policy.conditions.ensure(selection.prompt)
                    report = self.step(selection)
                    world.sum_([parameter.grad for parameter in self.step.replicated])
                    update += 1
                    with self.policy.updating():
                        norms = self.optimizer.update(functools.partial(guard.accepts, update, report))
                    if self.ema is not None and not guard.skipped:
                        self.ema.update()
                    progress.advance(phase)
                    metrics = _metrics(report, rollout, norms) | {"skipped": int(guard.skipped > 0)}
                    if place == 0 and config.rollout.replay == 0 and "trust" in report.rows:
                        # The policy is still the one that sampled: what is left is rounding.
                        metrics["trust_floor"] = report.rows["trust"].mean().item()
                    watched = (tracker.records, config.spike_factor, report, self.prompts.texts, guard.timestep)
                    metrics["spikes"] = count_spikes(update, metrics, *watched)
                    tracker.log("train", update, metrics, meter.read(len(selection)))
                    if config.dump_anomalies and guard.skipped and world.is_main:
                        anomalies.write(run, update, selection, remembered, config, self.prompts)
                    guard.check(update)
                    note_written()
                    status = f"reward {metrics['rollout_reward']:.3f}"
                    if compile_cost().graphs:
                        status += "; {0.graphs} graphs compiled in {0.seconds:.0f} s".format(compile_cost())
                    progress.update(overall, completed=update, status=status)
                    if place + 1 == config.rollout.updates_per_round:
                        self.source.finish()
                        rollout = None
        except Stopped:
            if update > checkpoints.saved:
                save()
            note_written(wait=True)
            raise
        finally:
            checkpoints.close()
            meter.close()
            tracker.close()
        table = final_table(tracker.records)
        if world.is_main:
            write_file(run / "table.md", markdown(table))
        console.print(table)
        if passed:
            raise BoundPassed(passed)
        return tracker.records

    def _fix_rows(self) -> None:
        """Let a compiled policy's passes have the rows of the step's largest part, in rollouts too."""
        if self.policy.compile != "none":
            most = math.ceil(max(STEPS[self.config.method].cost(self.config).rows.values()) / self.world.size)
            self.policy.static_rows = (math.ceil(most / math.ceil(most / self.step.micro_batch)),)

    def _evaluate(self, run: Path, tracker: Records, update: int, before: Tensor, meter: GpuMeter) -> None:
        """Measure the policy and write its pictures and weights; the record comes last, and says that all is done."""
        after = self.evaluator.images()
        columns = {"pretrained": before, f"after {update} updates, same noise": after}
        metrics = self.world.broadcast(lambda: self.evaluator.measure(after))
        if self.ema is not None:
            with self.ema.applied():
                columns["averaged weights, same noise"] = averaged = self.evaluator.images()
            found = self.world.broadcast(lambda: self.evaluator.measure(averaged))
            metrics |= {f"ema_{name}": value for name, value in found.items()}
        if self.world.is_main:
            records = [*tracker.records, {"phase": "evaluate", "update": update, **metrics}]
            self._write_pictures(run, records, update, columns)
        self._write_weights(run, is_best(metrics["reward"], tracker.records))
        tracker.log("evaluate", update, metrics, meter.read(0))

    def _write_weights(self, run: Path, best: bool) -> None:
        partial, main = run / ".weights.partial", self.world.is_main
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        save_policy(self.policy, partial, self.policy.dtype, main)
        if best and main:
            for folder in list(partial.iterdir()):
                shutil.copytree(folder, partial / BEST / folder.name)
        if self.ema is not None:
            with self.ema.applied():
                save_policy(self.policy, partial / AVERAGE, self.policy.dtype, main)
        if main:
            move_files(partial, run)

    def _due(self, update: int, every: int) -> bool:
        """Whether something done every so many updates (0: only at the end) is to be done after this rollout's."""
        before = update - self.config.rollout.updates_per_round
        return update == self.config.updates or (every > 0 and update // every > before // every)

    def _evaluation_sample(self, rows: Tensor, noise: int) -> Tensor:
        numbers = self.evaluator.prompt[rows] + self.prompts.evaluated.start
        return self.sampler(numbers, [seed_of(self.config.seed, "evaluation", noise, i) for i in rows.tolist()])

    def _write_pictures(
        self, run: Path, records: list[dict[str, Any]], update: int, columns: dict[str, Tensor]
    ) -> None:
        (run / "samples").mkdir(exist_ok=True)
        prompts = self.evaluator.prompts[:: self.config.evaluation.samples]
        save_grid(run / "samples" / f"update-{update:04d}.png", columns, prompts)
        save_curves(run / "curves.png", records)


def _metrics(report: StepReport, rollout: dict[str, float], norms: dict[str, Tensor]) -> dict[str, float]:
    """A training step's numbers by name; waits for the device."""
    metrics = dict(rollout)
    metrics |= {"loss" if name == "loss" else f"loss_{name}": value.item() for name, value in report.losses.items()}
    metrics |= {name: value.item() for name, value in report.statistics.items()}
    metrics |= {f"rows_{kind}": count for kind, count in report.counts.items()}
    metrics |= {f"passes_{kind}": value for kind, value in report.passes.items()}
    return metrics | {name: value.item() for name, value in norms.items()}
