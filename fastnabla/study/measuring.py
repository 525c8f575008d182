"""Samples the runs of a study and measures the samples. Nothing is sampled twice."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastnabla.config.on_any_machine import on_any_machine
from fastnabla.config.train import TrainConfig, load_run
from fastnabla.metrics.divergence import TrajectoryDivergence, divergence_summary
from fastnabla.metrics.measures import concatenate, measure_images
from fastnabla.models.saved_policy import read_policy
from fastnabla.prompts import RunPrompts, load_prompts, prompts_of
from fastnabla.run.lock import locked
from fastnabla.study.parts import MEASURED, Part, own_parts, shared_parts
from fastnabla.study.plan import StudyRun
from fastnabla.study.protocol import Protocol
from fastnabla.study.samples import Samples, write_samples
from fastnabla.training.build import plan_and_build
from fastnabla.trajectories.rollout import Recorder, sample
from fastnabla.utils.durable import write_file
from fastnabla.utils.progress import TaskProgress
from fastnabla.utils.require import require
from fastnabla.utils.seeding import seed_of

DIVERGENCE_FILE = "divergence.json"


def read_divergence(run: StudyRun) -> dict[str, Any] | None:
    """The KL along the run's trajectories (`divergence_summary`), if it has been measured.

    Raises:
        ValueError: the file is damaged.
    """
    path = run.folder / MEASURED / DIVERGENCE_FILE
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); remove it to measure again.") from error


def is_measured(run: StudyRun, protocol: Protocol) -> bool:
    """Whether all samples of the run have been measured."""
    measured = all(part.is_measured for part in own_parts(run, protocol))
    return measured and (read_divergence(run) is not None or not run.is_final)


def measure_run(run: StudyRun, protocol: Protocol, console: Console) -> None:
    """Sample and measure what has not been measured of a finished run.

    Raises:
        ValueError: the run's weights do not fit it, a file is damaged, or another process measures or trains the run.
    """
    missing = [part for part in own_parts(run, protocol) if not part.is_measured]
    divergence = run.is_final and read_divergence(run) is None
    if not missing and not divergence:
        return
    with locked(run.folder):
        networks = _Networks(load_run(run.folder), protocol.measurement.held_out)
        read_policy(networks.components.policy, run.folder)
        count = protocol.measurement.divergence_samples if divergence else 0
        with networks.progress(f"measuring {run.folder.name}", missing, count, console) as progress:
            for part in missing:
                write_samples(part.path, networks.measure(part, progress.advance), part.key)
            if divergence:
                values = networks.divergence(run.seed, count, progress.advance)
                write_file(run.folder / MEASURED / DIVERGENCE_FILE, json.dumps(values) + "\n")


def measure_pretrained(run: StudyRun, protocol: Protocol, folder: Path, console: Console) -> None:
    """Sample and measure the pretrained model for the measures of `run`, unless it has been. Waits while another process does.

    Raises:
        ValueError: the model, the reward or the probe cannot be built, or a file is damaged.
    """
    parts = shared_parts(run, protocol, folder)
    if all(part.is_measured for part in parts):
        return
    parts[0].path.parent.mkdir(parents=True, exist_ok=True)
    with locked(parts[0].path.parent, wait=True):
        missing = [part for part in parts if not part.is_measured]
        if not missing:
            return
        networks = _Networks(run.planned.config, protocol.measurement.held_out)
        title = f"measuring the pretrained model for seed {run.seed}"
        with networks.progress(title, missing, 0, console) as progress:
            for part in missing:
                write_samples(part.path, networks.measure(part, progress.advance), part.key)


def measured_prompts(config: TrainConfig, held_out: str | None) -> RunPrompts:
    """The prompts that the run `config` trains on, followed by those of the source `held_out` that it does not train on.

    The latter are the evaluated ones; without a source these are the run's first training prompts.

    Raises:
        ValueError: a source cannot be read, or the run trains on all prompts of `held_out`.
    """
    own = prompts_of(config.prompts, config.evaluation.prompts, config.seed)
    seen = own.texts[: own.trained]
    if held_out is None:
        return RunPrompts(texts=seen, trained=len(seen), evaluated=range(len(seen))[: config.evaluation.prompts])
    fresh = [text for text in load_prompts(held_out, field="measurement.held_out") if text not in set(seen)]
    require(bool(fresh), "measurement.held_out", held_out, "the runs train on all of these prompts; give others.")
    texts = seen + fresh
    return RunPrompts(texts=texts, trained=len(seen), evaluated=range(len(seen), len(texts)))


class _Networks:
    """The pretrained networks of a run, with its prompts and others that it is not trained on.

    Args:
        config: the run.
        held_out: source of the other prompts, or None.
    """

    def __init__(self, config: TrainConfig, held_out: str | None) -> None:
        self.components = plan_and_build(on_any_machine(config), measured_prompts(config, held_out))

    def progress(self, name: str, parts: Sequence[Part], divergence: int, console: Console) -> TaskProgress:
        """Progress of sampling `parts`, and `divergence` trajectories of each prompt."""
        count = sum(part.samples * len(self.prompts(part.held_out is not None)) for part in parts)
        count += divergence * len(self.prompts(held_out=False))
        return TaskProgress(console, name, count * len(self.components.table))

    def prompts(self, held_out: bool) -> list[int]:
        """Numbers of the measured prompts."""
        prompts = self.components.prompts
        most = self.components.config.evaluation.prompts
        return list(prompts.evaluated) if held_out else list(range(prompts.trained))[:most]

    def measure(self, part: Part, advance: Callable[[int], None]) -> Samples:
        """Sample and measure a part; `advance` is called after each step with the number of trajectories."""
        policy = self.components.policy
        if part.scale == 0:
            weights = policy.pretrained_weights()
        else:
            weights = contextlib.nullcontext() if part.scale == 1 else policy.scaled_lora(part.scale)
        numbers = self.prompts(part.held_out is not None)
        with weights:
            latents = self._sample(numbers, part, advance)
        parts = [self._measured(own, number) for own, number in zip(latents, numbers, strict=True)]
        correct = [each.correct for each in parts]
        return Samples(
            measures=concatenate([each.measures for each in parts]),
            correct=None if any(each is None for each in correct) else torch.cat(correct),
        )

    @torch.no_grad()
    def _measured(self, latents: Tensor, number: int) -> Samples:
        """The samples `latents [n, C, H, W]` of one prompt."""
        components, chunk = self.components, self.components.config.memory.decode_chunk
        images, probe = components.decoder.decode(latents), components.probe
        texts = [components.prompts.texts[number]] * len(images)
        numbers = torch.full((len(images),), number)
        measures = measure_images(images, numbers, texts, components.reward, probe, chunk)
        correct = probe.is_correct(images, texts).double().cpu() if hasattr(probe, "is_correct") else None
        return Samples(measures=measures, correct=correct)

    def divergence(self, seed: int, samples: int, advance: Callable[[int], None]) -> dict[str, Any]:
        """The KL along `samples` trajectories of each prompt."""
        part = Part(path=Path(), scale=1.0, samples=samples, seed=seed)
        numbers = self.prompts(held_out=False)
        prompt = torch.tensor(numbers).repeat_interleave(samples)
        recorder = TrajectoryDivergence(self.components.policy, self.components.table, prompt)
        self._sample(numbers, part, advance, recorder)
        return divergence_summary(recorder.steps)

    def _sample(
        self, numbers: list[int], part: Part, advance: Callable[[int], None], recorder: Recorder | None = None
    ) -> Tensor:
        """Finished latents `[P, n, C, H, W]`."""
        components = self.components
        prompt = torch.tensor(numbers).repeat_interleave(part.samples)
        seeds = [
            seed_of(part.seed, "evaluation", part.noise, number, each)
            for number in numbers
            for each in range(part.samples)
        ]
        latents = sample(
            components.policy,
            components.table,
            prompt,
            seeds,
            components.sample_shape,
            batch=components.config.rollout.batch,
            buffer=recorder,
            slots=torch.arange(len(prompt)),
            final_noise=False,
            on_step=advance,
            backend=components.config.backend,
        )
        return latents.unflatten(0, (len(numbers), part.samples))
