"""The runs of a study: ordinary run folders of `python -m fastnabla.train`."""

import dataclasses
import functools
from pathlib import Path

from fastnabla.comparison.plan import PlannedRun
from fastnabla.comparison.settings import method_config, method_settings
from fastnabla.config.train import TrainConfig
from fastnabla.cost.budget import updates_within
from fastnabla.run.resuming import AUTO
from fastnabla.study.protocol import Contender, Protocol
from fastnabla.utils.require import require

RUNS = "runs"
"""Folder of all runs within the study's."""
ENDED_EARLY = "ended-early.txt"
"""File in the folder of a run that diverged, or passed a bound of its evaluation. It is not trained again."""
RATE = "optimizer.learning_rate"


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Setting:
    """A method with one learning rate."""

    name: str
    """The contender's."""
    learning_rate: float

    def __str__(self) -> str:
        return f"{self.name},{self.learning_rate:g}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """A run of a setting."""

    setting: Setting
    is_final: bool
    """Whether it is compared; otherwise it tunes the learning rate."""
    planned: PlannedRun

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.planned.config.seed

    @property
    def name(self) -> str:
        """`run_name`."""
        return run_name(self.setting, self.seed)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.planned.folder

    @property
    def ended_early(self) -> bool:
        """Whether the run diverged, or passed a bound of its evaluation."""
        return (self.folder / ENDED_EARLY).exists() and not self.planned.done


def run_name(setting: Setting, seed: int) -> str:
    """The name of a run and of its folder."""
    return f"{setting}-seed-{seed}"


def tuning_runs(protocol: Protocol, folder: Path) -> list[StudyRun]:
    """The runs that tune the learning rates, by seed. A single learning rate needs none."""
    return [
        _run(protocol, folder, contender, rate, seed, is_final=False)
        for seed in protocol.tuning.seeds
        for contender in protocol.methods
        for rate in contender.learning_rates
        if contender.is_tuned
    ]


def final_runs(protocol: Protocol, folder: Path, settings: list[Setting]) -> list[StudyRun]:
    """The runs of the chosen `settings`, by seed."""
    contenders = {contender.name: contender for contender in protocol.methods}
    return [
        _run(protocol, folder, contenders[setting.name], setting.learning_rate, seed, is_final=True)
        for seed in protocol.final.seeds
        for setting in settings
    ]


def run_config(protocol: Protocol, contender: Contender, learning_rate: float) -> TrainConfig:
    """The configuration of a contender's runs, without folder and seed.

    Raises:
        ValueError: a setting is invalid, there is no LoRA to scale, or the seed would change the training prompts.
        SystemExit: a field does not exist or a value has the wrong type; a message is printed.
    """
    method, rate = contender.method, repr(learning_rate)
    for field, value in (protocol.settings | contender.settings).items():
        require(field.replace("-", "_") != RATE, field, value, "the learning rates are set by methods.learning_rates.")
    given = [f"{field}={value}" for field, value in protocol.settings.items()]
    own = contender.settings | {RATE: rate}
    given += [f"{method}.{field}={value}" for field, value in own.items()]
    config = _parsed(protocol.preset, method, tuple(given))
    require(config.lora.rank > 0, "lora.rank", config.lora.rank, "a study scales the LoRA; set it to at least 1.")
    require(
        config.prompts.held_out == 0,
        "prompts.held_out",
        config.prompts.held_out,
        "runs of different seeds would have different prompts; set it to 0, and name others in measurement.held_out.",
    )
    updates = updates_within(config, protocol.passes)
    # The run is evaluated at its beginning and its end only: `fastnabla.study.measuring` measures it.
    evaluation = dataclasses.replace(config.evaluation, every=updates)
    return dataclasses.replace(config, updates=updates, evaluation=evaluation)


@functools.cache
def _parsed(preset: str, method: str, given: tuple[str, ...]) -> TrainConfig:
    """Parsed once, which takes 50 ms. All runs of a setting share its sections, which nothing changes."""
    return method_config(preset, method, method_settings(preset, method, given))


def _run(
    protocol: Protocol, folder: Path, contender: Contender, learning_rate: float, seed: int, *, is_final: bool
) -> StudyRun:
    setting = Setting(contender.name, learning_rate)
    config = run_config(protocol, contender, learning_rate)
    config = dataclasses.replace(config, seed=seed, run=folder / RUNS / run_name(setting, seed), resume=AUTO)
    return StudyRun(setting=setting, is_final=is_final, planned=PlannedRun(variant=str(setting), config=config))
