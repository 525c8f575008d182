"""The training loop: rollout → updates → evaluation → checkpoint, straight down."""

import dataclasses
import functools
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastnabla.accumulation import StepReport
from fastnabla.anomaly import Anomalies
from fastnabla.bounds import BoundPassed, passed_bound, require_measurable
from fastnabla.buffer import TrajectoryBuffer
from fastnabla.checkpoint import Checkpoints, Progress, TrainState
from fastnabla.config import TrainConfig, to_json
from fastnabla.draws import DRAWS
from fastnabla.durable import move_files, write_file
from fastnabla.gpu_meter import GpuMeter
from fastnabla.guards import Guard, finite_samples
from fastnabla.methods import METHODS
from fastnabla.metrics.evaluation import Evaluator
from fastnabla.metrics.probes import build_probe
from fastnabla.networks import build_networks
from fastnabla.optim import Optimizer
from fastnabla.pictures import save_curves, save_grid
from fastnabla.pipeline import image_size, pipeline_of, save_policy, tokenizers
from fastnabla.planner import planned
from fastnabla.prompts import RunPrompts, assign_prompts, load_run_prompts, warn_truncated
from fastnabla.resuming import check_length, fingerprint
from fastnabla.rewards import RewardSum, build_reward, check_reward
from fastnabla.rewards.options import RewardOptions, parse_weights
from fastnabla.rollout import sample
from fastnabla.run_lock import RunFolderError, locked
from fastnabla.run_table import decimals, final_table, markdown
from fastnabla.sections import RewardConfig
from fastnabla.seeding import seed_of
from fastnabla.signals import Stopped, StopSignals
from fastnabla.spikes import count_spikes
from fastnabla.telemetry import Tracker, progress_bar
from fastnabla.trajectories import NewTrajectories, Source, StoredTrajectories


def device_of(config: TrainConfig) -> torch.device:
    """Where the run `config` computes.

    Raises:
        ValueError: it names a GPU, and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': torch sees no GPU here; use --device cpu.")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if config.device == "auto" else config.device)


class Trainer:
    """Everything a run consists of, built from its configuration.

    Building it checks all input (prompts, model, sampler, reward, probe) and does no work yet.

    Args:
        config: the run's.
        prompts: an interrupted run's, from its folder; None to load those that `config` names.

    Raises:
        ValueError: something in the configuration is wrong; the message names the field and a remedy.
    """

    def __init__(self, config: TrainConfig, prompts: RunPrompts | None = None) -> None:
        self.device = device_of(config)
        self.config = config = planned(config, self.device)[0]
        if config.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ValueError("tracker = 'wandb': the package is not installed; run: pip install wandb")
        self.prompts = prompts or load_run_prompts(
            config.prompts.source,
            config.prompts.template,
            config.prompts.held_out,
            config.prompts.evaluation,
            config.evaluation.prompts,
            config.seed,
        )
        self.reward = _build_reward(config.reward, config.model.random_init, self.device)
        self.probe = build_probe(config.evaluation.probe, self.device)
        require_measurable(config.evaluation, self.probe)

        pipeline = pipeline_of(config.model)
        check_reward(self.reward, self.prompts.texts, image_size(pipeline), self.device)
        warn_truncated(self.prompts.texts, *tokenizers(pipeline))
        networks = build_networks(pipeline, self.prompts, config, self.device)
        self.policy, self.flow, self.decoder = networks.policy, networks.flow, networks.decoder
        self.table, self.sample_shape = networks.table, networks.sample_shape
        method = METHODS[config.method]
        self.step = method.build(config, networks, self.reward, self.prompts.texts)
        self.buffer: TrajectoryBuffer | None = None
        self.source: Source = NewTrajectories(config.seed, config.rollout.trajectories, self.prompts.trained)
        if method.stores:
            self.buffer = TrajectoryBuffer(
                config.rollout.trajectories,
                len(self.table),
                config.drawn_steps + 1,
                self.sample_shape,
                device=self.device,
                storage=config.memory.buffer,
                output_block=config.memory.output_block,
                timestep=self.table.timestep,
            )
            self.source = StoredTrajectories(self._rollout, self.buffer)
        self.optimizer = Optimizer(self.policy, self.flow, config.optimizer, config.flow, config.updates)
        self.evaluator = Evaluator(
            self._evaluation_sample,
            self.decoder,
            self.reward,
            self.probe,
            [self.prompts.texts[i] for i in self.prompts.evaluated],
            config.evaluation.samples,
            config.memory.decode_chunk,
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
        """
        with locked(run):
            return self._train(run, console or Console(quiet=True), resume, stop or StopSignals())

    def _train(self, run: Path, console: Console, resume: bool, stop: StopSignals) -> list[dict[str, Any]]:
        config, evaluator = self.config, self.evaluator
        state = TrainState(
            policy=self.policy,
            flow=self.flow,
            optimizer=self.optimizer,
            reward=self.reward,
            step=self.step,
            buffer=self.buffer,
        )
        checkpoints = Checkpoints(run, state, fingerprint(config, self.prompts), config.checkpoint_keep)
        done = checkpoints.load() if resume else Progress()
        update, rollout = done.update, done.rollout
        check_length(update, config.updates)
        if not resume:
            if (run / "config.json").exists():
                raise RunFolderError(f"run = {str(run)!r}: a run was begun there; resume it, or name another folder.")
            self.prompts.save(run / "prompts.json")
            write_file(run / "config.json", to_json(config))
        tracker = Tracker(run, config.tracker, dataclasses.asdict(config), update)
        guard = Guard(self.prompts.texts, self.table.timestep, config.max_skipped, tracker.last_in_a_row("skipped"))
        anomalies = Anomalies(policy=self.policy, flow=self.flow, reward=self.reward, step=self.step)
        meter = GpuMeter(self.device)
        meter.start()

        def save() -> None:
            tracker.flush()
            checkpoints.save(Progress(update, rollout))

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

                self._advance = advance
                begin("pretrained samples", 2 * len(evaluator.prompts) * len(self.table))
                with self.policy.pretrained_weights():
                    before = evaluator.images()
                    evaluator.set_prior(evaluator.images(noise=1))
                tracker.measure("start", update, {})
                if not tracker.has("evaluate", 0):
                    tracker.log("evaluate", 0, evaluator.measure(before), meter.read(0))

                meter.read(0)
                parts = torch.arange(config.rollout.trajectories).chunk(config.rollout.updates)
                while True:
                    if rollout is None and update > 0:
                        if self._due(update, config.evaluation.every) and not tracker.has("evaluate", update):
                            begin("evaluation", len(evaluator.prompts) * len(self.table))
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
                    round_ = update // config.rollout.updates
                    if rollout is None:
                        begin("rollout", config.rollout.trajectories * len(self.table))
                        rollout = self.source.collect(round_)
                    stop.check()
                    begin("step", 1)
                    selection = self.source.select(round_, parts[update % config.rollout.updates])
                    remembered = anomalies.before() if config.dump_anomalies else {}
                    report = self.step(selection)
                    update += 1
                    norms = self.optimizer.update(functools.partial(guard.accepts, update, report))
                    progress.advance(phase)
                    metrics = _metrics(report, rollout, norms) | {"skipped": int(guard.skipped > 0)}
                    watched = (tracker.records, config.spike_factor, report, self.prompts.texts, guard.timestep)
                    metrics["spikes"] = count_spikes(update, metrics, *watched)
                    tracker.log("train", update, metrics, meter.read(len(selection)))
                    if config.dump_anomalies and guard.skipped:
                        anomalies.write(run, update, selection, remembered, config, self.prompts)
                    guard.check(update)
                    note_written()
                    progress.update(overall, completed=update, status=f"reward {metrics['rollout_reward']:.3f}")
                    if update % config.rollout.updates == 0:
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
        write_file(run / "table.md", markdown(table))
        console.print(table)
        if passed:
            raise BoundPassed(passed)
        return tracker.records

    def _evaluate(self, run: Path, tracker: Tracker, update: int, before: Tensor, meter: GpuMeter) -> None:
        """Measure the policy and write its pictures and weights; the record comes last, and says that all is done."""
        after = self.evaluator.images()
        metrics = self.evaluator.measure(after)
        records = [*tracker.records, {"phase": "evaluate", "update": update, **metrics}]
        self._write_pictures(run, records, update, before, after)
        partial = run / ".weights.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_policy(self.policy, partial, self.policy.dtype)
        move_files(partial, run)
        tracker.log("evaluate", update, metrics, meter.read(0))

    def _due(self, update: int, every: int) -> bool:
        """Whether something done every so many updates (0: only at the end) is to be done after this rollout's."""
        before = update - self.config.rollout.updates
        return update == self.config.updates or (every > 0 and update // every > before // every)

    def _rollout(self, round_: int) -> dict[str, float]:
        """Fill the buffer with trajectories of the current policy; statistics of their rewards."""
        config = self.config
        count = config.rollout.trajectories
        first = round_ * count
        self.buffer.clear()
        prompt = assign_prompts(config.seed, first, count, self.prompts.trained)
        draw = DRAWS[config.rollout.draw]
        steps = draw(seed_of(config.seed, "draws"), first, count, len(self.table), config.drawn_steps)
        seeds = [seed_of(config.seed, "noise", first + i) for i in range(count)]
        latents = self._sample(prompt, seeds, self.buffer, self.buffer.reserve(steps, prompt))
        texts = [self.prompts.texts[i] for i in prompt.tolist()]
        parts = self.reward.parts(self.decoder.decode(latents), texts, config.memory.decode_chunk)
        finite = finite_samples(latents, parts, texts).to(latents.device)
        rewards = self.reward.total(parts)[finite]
        sound = {name: values[finite] for name, values in parts.items()}
        self.reward.observe(sound)
        self.buffer.reward.copy_(torch.where(finite, self.reward.shape(parts), float("nan")))
        metrics = {"rollout_reward": rewards.mean().item(), "rollout_reward_std": rewards.std().item()}
        return metrics | {f"rollout_reward_{name}": values.mean().item() for name, values in sound.items()}

    def _evaluation_sample(self, prompt: Tensor, noise: int) -> Tensor:
        numbers = prompt + self.prompts.evaluated.start
        return self._sample(numbers, [seed_of(self.config.seed, "evaluation", noise, i) for i in range(len(prompt))])

    def _sample(
        self, prompt: Tensor, seeds: list[int], buffer: TrajectoryBuffer | None = None, slots: Tensor | None = None
    ) -> Tensor:
        return sample(
            self.policy,
            self.table,
            prompt,
            seeds,
            self.sample_shape,
            batch=self.config.rollout.batch,
            buffer=buffer,
            slots=slots,
            on_step=self._advance,
            backend=self.config.backend,
        )

    def _advance(self, count: int) -> None:
        """Report progress; `train` replaces it."""

    def _write_pictures(
        self, run: Path, records: list[dict[str, Any]], update: int, before: Tensor, after: Tensor
    ) -> None:
        (run / "samples").mkdir(exist_ok=True)
        prompts = self.evaluator.prompts[:: self.config.evaluation.samples]
        columns = {"pretrained": before, f"after {update} updates, same noise": after}
        save_grid(run / "samples" / f"update-{update:04d}.png", columns, prompts)
        save_curves(run / "curves.png", records)


def _build_reward(config: RewardConfig, random_init: bool, device: torch.device) -> RewardSum:
    options = RewardOptions(
        weights=parse_weights(config.weights),
        preprocess=config.preprocess,
        checkpoint=config.checkpoint,
        tf32=config.tf32,
        random_init=random_init,
    )
    return build_reward(config.terms, device, options, config.normalise, config.clip, config.timeout)


def _metrics(report: StepReport, rollout: dict[str, float], norms: dict[str, Tensor]) -> dict[str, float]:
    """A training step's numbers by name; waits for the device."""
    metrics = dict(rollout)
    metrics |= {"loss" if name == "loss" else f"loss_{name}": value.item() for name, value in report.losses.items()}
    metrics |= {name: value.item() for name, value in report.statistics.items()}
    metrics |= {f"rows_{kind}": count for kind, count in report.counts.items()}
    metrics |= {f"passes_{kind}": value for kind, value in report.passes.items()}
    return metrics | {name: value.item() for name, value in norms.items()}
