"""Which run a command line continues, and whether the configurations match."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fastnabla.config.fields import dotted
from fastnabla.config.model_sections import SamplerConfig
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
    "hang_timeout",
    "dump_anomalies",
    "reward.timeout",
    "evaluation.stop_below_diversity",
    "evaluation.stop_above_prior",
)
"""Fields that no result depends on, not even in rounding. `updates` is another if `can_extend(config)`."""

FALLING = (
    "A run cannot be extended with optimizer.schedule = {schedule!r}, because every learning rate depends on the number of "
    "updates. Start a run of the new length, or one with 'constant', which can be extended later."
)
ANNEALED = (
    "A run cannot be extended with objective.beta_schedule = {schedule!r}, because every β depends on the number of updates. "
    "Start a run of the new length, or one with 'constant', which can be extended later."
)
LAGGING = (
    "A run cannot be extended with rollout.replay = {replay}, because its last updates no longer sample ahead. Start a run "
    "of the new length, or one with 0, which can be extended later."
)

INTRODUCED: dict[str, Any] = {
    "model.config": None,
    "deterministic": False,
    "model.height": None,
    "model.width": None,
    "model.quantise": "none",
    "sampler.spacing": None,
    "sampler.min_sigma": None,
    "objective.reverse_target": "policy",
    "objective.reverse_fraction": 1.0,
    "objective.beta_schedule": "constant",
    "flow.average": None,
    "prompts.column": None,
    "prompts.bad_lines": "refuse",
    "direct.truncation": "fixed",
    "direct.kl": 0.0,
    "direct.guidance_scale": None,
}
"""Fields that older versions lack, and the value that matches those versions. A field with this value is not part of the
fingerprint, so checkpoints of those versions fit."""
BEFORE_CONFIGURATION = {".lock", ".prompts.json.partial", "prompts.json", ".config.json.partial"}
"""Files that a run writes before config.json."""


def flat(config: TrainConfig) -> dict[str, Any]:
    """All fields by dotted name, with their JSON values."""
    return json.loads(json.dumps(dotted(config), default=str))


def can_extend(config: TrainConfig) -> bool:
    """Whether the run's updates are independent of their number; `_why_not` has the exceptions."""
    return _why_not(config) is None


def _why_not(config: TrainConfig) -> str | None:
    """Why the run cannot be extended; None if it can."""
    if config.optimizer.schedule != "constant":
        return FALLING.format(schedule=config.optimizer.schedule)
    if config.objective.beta_schedule != "constant":
        return ANNEALED.format(schedule=config.objective.beta_schedule)
    return LAGGING.format(replay=config.rollout.replay) if config.rollout.replay else None


def updates_of(config: TrainConfig, own: TrainConfig) -> int:
    """Length of the run `own` that the command line `config` continues, once `run_to_resume` has allowed it."""
    return max(own.updates, config.updates) if config.resume == AUTO else own.updates


def check_length(done: int, updates: int) -> None:
    """Check that a run of `updates` updates can continue after `done`.

    Raises:
        RunFolderError: more updates than that are done.
    """
    if done > updates:
        raise RunFolderError(f"updates = {updates}: the run has done {done}; set at least that in its config.json.")


def effective_fields(config: TrainConfig) -> dict[str, Any]:
    """The fields that results depend on, by dotted name, with their JSON values."""
    without_effect = (*WITHOUT_EFFECT, "updates") if can_extend(config) else WITHOUT_EFFECT
    fields = {name: value for name, value in flat(config).items() if name not in without_effect}
    fields = {name: value for name, value in fields.items() if (name, value) not in INTRODUCED.items()}
    return with_old_names(fields)


def fingerprint(config: TrainConfig, prompts: RunPrompts) -> str:
    """SHA-256 of the prompts and the fields that results depend on."""
    fields = effective_fields(config)
    fields["prompts.json"] = [prompts.texts, prompts.trained, prompts.evaluated.start, prompts.evaluated.stop]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def is_unbegun(run: Path) -> bool:
    """Whether `run` is a folder in which a job ended before it wrote config.json."""
    return run.is_dir() and {path.name for path in run.iterdir()} <= BEFORE_CONFIGURATION


def run_to_resume(config: TrainConfig) -> tuple[Path, list[str]] | None:
    """The run folder that the command line `config` continues, and notes to print; None if it starts a new run.

    With resume = "auto" it is the folder `run`, if it holds a run. The run keeps its own configuration. A field of the command
    line that differs is refused if results depend on it, and otherwise named in a note. If the command line has more updates
    and `can_extend` allows it, the run is extended.

    Raises:
        ValueError: there is no run to resume, or its configuration differs.
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
    # A field left open takes the run's value, which was planned or chosen by its device.
    names = [n for n in names if ours[n] is not None or not (n.startswith("memory.") or n == "reward.precision")]
    # Older versions had no default spacing: their runs keep the checkpoint's.
    names = [n for n in names if (n, ours[n], theirs[n]) != ("sampler.spacing", SamplerConfig().spacing, None)]
    extended = can_extend(own) and config.updates > own.updates
    refused = [name for name in names if name not in WITHOUT_EFFECT and not (name == "updates" and can_extend(own))]
    if refused:
        raise ValueError(
            f"resume = 'auto': the run in {str(config.run)!r} has another configuration: "
            + ", ".join(f"{name} = {theirs[name]!r}, not {ours[name]!r}" for name in refused)
            + ". Use the run's configuration, or another --run."
            + (f" {_why_not(own)}" if "updates" in refused else "")
        )
    notes = [f"updates = {config.updates}: the run of {own.updates} updates is extended"] if extended else []
    names = [name for name in names if not (name == "updates" and extended)]
    return config.run, notes + [f"{name} = {ours[name]!r} is ignored: the run has {theirs[name]!r}" for name in names]
