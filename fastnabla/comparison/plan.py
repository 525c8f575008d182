"""What a comparison consists of: a run of each method, or variant of one, and seed, with one budget."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from fastnabla.comparison.budget import update_passes, updates_within
from fastnabla.comparison.settings import method_config, method_settings, split_variant
from fastnabla.config.presets import PRESETS
from fastnabla.config.train import TrainConfig
from fastnabla.run.resuming import AUTO, is_unbegun, run_to_resume

LAST_FILE = "table.md"
"""What a run writes when all is done."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """An ordinary run of `python -m fastnabla.train`."""

    variant: str
    """What it is called in all tables and pictures: its method, or METHOD,FIELD=VALUE,…"""
    config: TrainConfig
    """With its folder as `run`, to be resumed if it was begun."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.config.run

    @property
    def done(self) -> bool:
        """Whether it has reached its end."""
        return (self.folder / LAST_FILE).exists()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All runs of a comparison."""

    preset: str
    passes: float | None
    """Budget of each run, in U; None if all make the same number of updates."""
    settings: dict[str, dict[str, str]]
    """Variant → in which fields it differs from the preset."""
    runs: tuple[PlannedRun, ...]
    """Seed by seed, so that what is there when half is done can be compared."""

    @property
    def variants(self) -> list[str]:
        """In the order of the command line."""
        return list(self.settings)

    def of(self, variant: str) -> list[PlannedRun]:
        """Its runs, by seed."""
        return [run for run in self.runs if run.variant == variant]

    def check_folders(self) -> None:
        """Whether each folder is the planned run's, or nobody's.

        Raises:
            ValueError: one is another run's, or no run's.
        """
        for run in self.runs:
            if run_to_resume(run.config) is None and run.folder.exists() and not is_unbegun(run.folder):
                raise ValueError(f"run = {str(run.folder)!r}: exists and is no run; name another folder, or remove it.")

    def restricted_to(self, names: Sequence[str]) -> "Plan":
        """With the runs whose folders have these names alone.

        Raises:
            ValueError: a run has no such name.
        """
        known = {run.folder.name: run for run in self.runs}
        for name in names:
            if name not in known:
                raise ValueError(f"only = {name!r}: the runs are {', '.join(known)}.")
        return dataclasses.replace(self, runs=tuple(known[name] for name in dict.fromkeys(names)))

    @property
    def common_settings(self) -> list[str]:
        """In which all variants differ from the preset, FIELD = VALUE; where not all in the same way, as most."""
        first, *_ = given = list(self.settings.values())
        names = [name for name in first if all(name in settings for settings in given)]
        most = {name: Counter(settings[name] for settings in given).most_common(1)[0][0] for name in names}
        return [f"{name} = {value}" for name, value in most.items()]

    def own_settings(self, variant: str) -> list[str]:
        """In which it differs from the preset besides, and its name does not say."""
        _, named = split_variant(variant)
        texts = [f"{name} = {value}" for name, value in self.settings[variant].items() if name not in named]
        return [text for text in texts if text not in self.common_settings]

    def table(self) -> Table:
        """What each method will spend."""
        budget = "equal updates" if self.passes is None else f"{self.passes:,.0f} U a run"
        caption = f"of all, but for own settings: {', '.join(self.common_settings)}" if self.common_settings else None
        table = Table(
            title=f"{self.preset}, {budget} (U: one UNet pass over a transition's guided rows)",
            caption=caption and escape(caption),
        )
        for column in ("method", "runs", "done", "U an update", "updates", "U a run", "own settings"):
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
    """The runs of a comparison; nothing is built or written.

    Args:
        preset: name of one of `PRESETS`.
        methods: names, or variants, METHOD,FIELD=VALUE,…; the first sets the budget if neither `passes` nor `updates`
            does: what it spends in the preset's updates.
        seeds: runs of each variant, of seeds 0, 1, …
        folder: of the comparison; its runs are in METHOD-seed-N, variants in METHOD,FIELD=VALUE-seed-N.
        passes: U that each run may spend.
        updates: that each run makes instead, whatever it spends.
        points: most evaluations along each run.
        settings: see `fastnabla.comparison.settings.method_settings`.

    Raises:
        ValueError: something is wrong with an argument; the message names it.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset = {preset!r}: must be one of {', '.join(PRESETS)}.")
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods = {' '.join(methods)!r}: name at least one, and each once.")
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
