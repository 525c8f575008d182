"""The plan of a comparison: one run for each variant of a method and each seed, all with the same budget."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastnabla.comparison.settings import method_config, method_settings, split_variant
from fastnabla.config.presets import PRESETS
from fastnabla.config.train import TrainConfig, load_run
from fastnabla.cost.budget import update_passes, updates_within
from fastnabla.run.resuming import AUTO, is_unbegun, run_to_resume
from fastnabla.run.tracker import readable_records
from fastnabla.training.guards import passed_bound

LAST_FILE = "table.md"
"""The file that a run writes last, at its end or at a bound of its evaluation."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """An ordinary run of `python -m fastnabla.train`."""

    variant: str
    """Name in tables and plots: the method, or METHOD,FIELD=VALUE,…"""
    config: TrainConfig
    """Configuration, with the run folder as `run`. A run that has started is resumed."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run

    @property
    def done(self) -> bool:
        """Whether the run has finished: it was evaluated after its last update, and has not stopped at a bound.

        Raises:
            ValueError: the run's configuration cannot be read.
        """
        if not (self.folder / LAST_FILE).exists():
            return False
        evaluated = [record["update"] for record in self._records() if record["phase"] == "evaluate"]
        return max(evaluated, default=0) >= self.config.updates and self.passed_bound() is None

    def passed_bound(self) -> str | None:
        """The bound of its evaluation at which the run has stopped, in words; None if it has not. The run's own bounds count.

        Raises:
            ValueError: the run's configuration cannot be read.
        """
        return passed_bound(load_run(self.folder).evaluation, self._records())

    def _records(self) -> list[dict[str, Any]]:
        return readable_records(self.folder / "metrics.jsonl")

    def check_folder(self) -> None:
        """Check that the run folder is free or belongs to this run.

        Raises:
            ValueError: it belongs to another run or to one with another number of updates, or is not a run folder.
        """
        if run_to_resume(self.config) is None:
            if self.folder.exists() and not is_unbegun(self.folder):
                raise ValueError(
                    f"run = {str(self.folder)!r}: exists and is not a run folder; choose another folder, or remove it."
                )
        elif (started := load_run(self.folder).updates) != self.config.updates:
            raise ValueError(
                f"updates = {self.config.updates}: the run in {str(self.folder)!r} has started with {started}, which it keeps. "
                f"Give a budget of {started} updates, or another --run."
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All runs of a comparison."""

    preset: str
    passes: float | None
    """Budget of each run in U. None if all runs make the same number of updates."""
    settings: dict[str, dict[str, str]]
    """Variant → fields that differ from the preset → value."""
    runs: tuple[PlannedRun, ...]
    """Runs ordered by seed, so that a partly finished comparison is already meaningful."""

    @property
    def variants(self) -> list[str]:
        """Variants in the order of the command line."""
        return list(self.settings)

    def of(self, variant: str) -> list[PlannedRun]:
        """The runs of a variant, by seed."""
        return [run for run in self.runs if run.variant == variant]

    def check_folders(self) -> None:
        """`PlannedRun.check_folder` for all runs."""
        for run in self.runs:
            run.check_folder()

    def restricted_to(self, names: Sequence[str]) -> "Plan":
        """The plan with only the runs whose folders have these names.

        Raises:
            ValueError: a name belongs to no run.
        """
        known = {run.folder.name: run for run in self.runs}
        for name in names:
            if name not in known:
                raise ValueError(f"only = {name!r}: the runs are {', '.join(known)}.")
        return dataclasses.replace(self, runs=tuple(known[name] for name in dict.fromkeys(names)))

    @property
    def samples(self) -> int:
        """Samples per prompt of an evaluation, the same for all runs."""
        return self.runs[0].config.evaluation.samples

    @property
    def common_settings(self) -> list[str]:
        """Fields that all variants change, as "FIELD = VALUE". If the values differ, the most common one is given."""
        first, *_ = given = list(self.settings.values())
        names = [name for name in first if all(name in settings for settings in given)]
        values = {name: Counter(settings[name] for settings in given).most_common(1)[0][0] for name in names}
        return [f"{name} = {value}" for name, value in values.items()]

    def own_settings(self, variant: str) -> list[str]:
        """Other settings in which a variant differs from the preset, unless they are part of its name."""
        _, named = split_variant(variant)
        texts = [f"{name} = {value}" for name, value in self.settings[variant].items() if name not in named]
        return [text for text in texts if text not in self.common_settings]

    def table(self) -> Table:
        """Table of the planned cost of each variant."""
        budget = "equal updates" if self.passes is None else f"{self.passes:,.0f} U per run"
        caption = f"settings of all methods: {', '.join(self.common_settings)}" if self.common_settings else None
        table = Table(
            title=f"{self.preset}, {budget} (1 U: a UNet pass over the guided rows of a transition)",
            caption=caption and escape(caption),
        )
        for column in ("method", "runs", "done", "U per update", "updates", "U per run", "own settings"):
            left = column in ("method", "own settings")
            table.add_column(column, justify="left" if left else "right", overflow="fold")
        for variant in dict.fromkeys(run.variant for run in self.runs):
            runs = self.of(variant)
            config = runs[0].config
            each = update_passes(config)
            table.add_row(
                variant,
                str(len(runs)),
                str(sum(run.done for run in runs)),
                f"{each:,g}",
                str(config.updates),
                f"{each * config.updates:,.0f}",
                escape(", ".join(self.own_settings(variant))),
            )
        return table


def make_plan(
    preset: str,
    methods: Sequence[str],
    seeds: int,
    folder: Path,
    *,
    passes: float | None = None,
    updates: int | None = None,
    points: int = 6,
    settings: Sequence[str] = (),
) -> Plan:
    """Plan the runs of a comparison. Nothing is built or written.

    Args:
        preset: key of `PRESETS`.
        methods: methods, or variants METHOD,FIELD=VALUE,… If neither `passes` nor `updates` is given, the budget is what the
            first one costs with the preset's updates.
        seeds: runs per variant, with seeds 0, 1, …
        folder: folder of the comparison; its runs are METHOD-seed-N, those of variants METHOD,FIELD=VALUE-seed-N.
        passes: budget of each run in U.
        updates: updates of each run, whatever they cost; replaces `passes`.
        points: largest number of evaluations during each run.
        settings: see `fastnabla.comparison.settings.method_settings`.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset = {preset!r}: must be one of {', '.join(PRESETS)}.")
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods = {' '.join(methods)!r}: name at least one, and each only once.")
    if passes is not None and updates is not None:
        raise ValueError(f"updates = {updates}: give either updates or passes (= {passes:g}), not both.")
    for name, value in (("seeds", seeds), ("points", points), ("passes", passes), ("updates", updates)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} = {value}: must be positive and finite.")

    own = {variant: method_settings(preset, variant, settings) for variant in methods}
    configs = {variant: method_config(preset, variant, own[variant]) for variant in methods}
    if updates is None and passes is None:
        first = configs[methods[0]]
        passes = update_passes(first) * first.updates
    runs = []
    for seed, (variant, config) in itertools.product(range(seeds), configs.items()):
        count = updates if passes is None else updates_within(config, passes)
        evaluation = dataclasses.replace(config.evaluation, every=math.ceil(count / points))
        changes = {"seed": seed, "run": folder / f"{variant}-seed-{seed}", "updates": count, "resume": AUTO}
        runs.append(PlannedRun(variant=variant, config=dataclasses.replace(config, evaluation=evaluation, **changes)))
    return Plan(preset=preset, passes=passes, settings=own, runs=tuple(runs))
