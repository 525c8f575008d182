"""Which run a command line goes on with, and whether its configuration is that run's."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fastnabla.config.fields import dotted
from fastnabla.config.renamed import with_old_names
from fastnabla.config.train import TrainConfig, load_run
from fastnabla.prompts import RunPrompts
from fastnabla.run.lock import RunFolderError

AUTO = Path("auto")
WITHOUT_EFFECT = (
    "run",
    "resume",
    "dry_run",
    "vram",
    "tracker",
    "checkpoint_every",
    "checkpoint_keep",
    "max_skipped",
    "spike_factor",
    "dump_anomalies",
    "reward.timeout",
    "evaluation.stop_below_diversity",
    "evaluation.stop_above_prior",
)
"""Fields that no result depends on, not even in rounding. `updates` is another where `can_extend`."""

FALLING = (
    "A run cannot be extended with optimizer.schedule = {schedule!r}, whose step sizes fall by the number of updates "
    "from the first on: begin one of the wanted length, or, to extend it later, with 'constant'."
)
LAGGING = (
    "A run cannot be extended with rollout.replay = {replay}, whose last rounds sample nothing for rounds after them: begin "
    "one of the wanted length, or, to extend it later, with 0."
)

INTRODUCED: dict[str, Any] = {"deterministic": False}
"""Fields that older versions lack, and what they did. With that value a field is not part of the fingerprint, so that the
checkpoints of these versions fit."""
BEFORE_CONFIGURATION = {".lock", ".prompts.json.partial", "prompts.json", ".config.json.partial"}
"""Files that a run writes before its configuration."""


def flat(config: TrainConfig) -> dict[str, Any]:
    """All fields by their dotted names, as JSON has them."""
    return json.loads(json.dumps(dotted(config), default=str))


def can_extend(config: TrainConfig) -> bool:
    """Whether no update depends on how many there will be: a falling step size does, and what is sampled ahead."""
    return config.optimizer.schedule == "constant" and config.rollout.replay == 0


def updates_of(config: TrainConfig, own: TrainConfig) -> int:
    """Length of a run of the configuration `own` that the command line `config` goes on with, as `run_to_resume` allows."""
    return max(own.updates, config.updates) if config.resume == AUTO else own.updates


def check_length(done: int, updates: int) -> None:
    """Make sure that a run of `updates` can go on after `done`.

    Raises:
        RunFolderError: it is over already.
    """
    if done > updates:
        raise RunFolderError(f"updates = {updates}: the run has done {done}; put at least that into its config.json.")


def fingerprint(config: TrainConfig, prompts: RunPrompts) -> str:
    """SHA-256 of the fields that results depend on, and of the prompts."""
    without_effect = (*WITHOUT_EFFECT, "updates") if can_extend(config) else WITHOUT_EFFECT
    fields = {name: value for name, value in flat(config).items() if name not in without_effect}
    fields = {name: value for name, value in fields.items() if (name, value) not in INTRODUCED.items()}
    fields = with_old_names(fields)
    fields["prompts.json"] = [prompts.texts, prompts.trained, prompts.evaluated.start, prompts.evaluated.stop]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def is_unbegun(run: Path) -> bool:
    """Whether `run` is a folder in which a job ended before it wrote its configuration."""
    return run.is_dir() and {path.name for path in run.iterdir()} <= BEFORE_CONFIGURATION


def run_to_resume(config: TrainConfig) -> tuple[Path, list[str]] | None:
    """The folder that the command line `config` goes on with, and what to tell about it; None if it starts a run.

    With resume = auto it is `run`, if a run was begun there. The configuration that counts is then that run's own:
    a field of the command line that differs is refused if results depend on it, and told otherwise. More updates than the
    run's own extend it, if that is possible (`can_extend`).

    Raises:
        ValueError: there is no run to resume, or it has another configuration.
    """
    if config.resume is None:
        return None
    if config.resume != AUTO:
        return config.resume, []
    if not (config.run / "config.json").exists():
        return None
    own = load_run(config.run)
    ours, theirs = flat(config), flat(own)
    names = [name for name in ours if ours[name] != theirs[name] and name not in ("run", "resume", "dry_run")]
    # What is left open is as the run has it: planned, or chosen by its device.
    names = [n for n in names if ours[n] is not None or not (n.startswith("memory.") or n == "reward.precision")]
    extended = can_extend(own) and config.updates > own.updates
    refused = [name for name in names if name not in WITHOUT_EFFECT and not (name == "updates" and can_extend(own))]
    if refused:
        schedule, replay = own.optimizer.schedule, own.rollout.replay
        why = FALLING.format(schedule=schedule) if schedule != "constant" else LAGGING.format(replay=replay)
        raise ValueError(
            f"resume = 'auto': the run in {str(config.run)!r} was begun with another configuration: "
            + ", ".join(f"{name} = {theirs[name]!r}, not {ours[name]!r}" for name in refused)
            + ". Give its own configuration, or another --run."
            + (f" {why}" if "updates" in refused else "")
        )
    notes = [f"updates = {config.updates}: the run of {own.updates} is extended"] if extended else []
    names = [name for name in names if not (name == "updates" and extended)]
    return config.run, notes + [f"{name} = {ours[name]!r} is ignored: the run has {theirs[name]!r}" for name in names]
