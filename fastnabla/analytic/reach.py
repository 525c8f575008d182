"""`python -m fastnabla.analytic.reach`: how near each way of learning gets to the known target, with equal network passes.

The variants have the same target. Each run is trained to the end of its schedule, with several seeds and numbers of sampler
steps. Beside them stand the pretrained model, the target's exact score in the same sampler, which has only the sampler's error,
and exact draws.
"""

import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
from rich.console import Console
from rich.table import Table

from fastnabla.utils.console import command_console, print_error, quiet_libraries

quiet_libraries()

from matplotlib.figure import Figure  # noqa: E402

from fastnabla.analytic.config import AnalyticConfig, settings  # noqa: E402
from fastnabla.analytic.exact_score import ExactScoreNetwork  # noqa: E402
from fastnabla.analytic.experiment import Experiment  # noqa: E402
from fastnabla.analytic.measures import DISTANCES, effective_number, floors  # noqa: E402
from fastnabla.analytic.scheduler import alpha_bars  # noqa: E402
from fastnabla.analytic.training import measure, train  # noqa: E402
from fastnabla.config.train import to_json  # noqa: E402
from fastnabla.cost.budget import update_passes, updates_within  # noqa: E402
from fastnabla.distributed.launch import require_single_process  # noqa: E402
from fastnabla.run.table import markdown  # noqa: E402
from fastnabla.utils.durable import write_file  # noqa: E402
from fastnabla.utils.require import require  # noqa: E402

Variant = Literal["published", "reference", "averaged", "adjoint", "exact-flow"]
AVERAGE = 0.95
"""Decay of the average in "averaged"."""
COLUMNS = ("mode masses, × floor", "sliced W₁, × floor", "width", "reward", "updates", "U / 1000")
MEASURES = (*DISTANCES, "mode_width", "reward")


@dataclasses.dataclass(kw_only=True, slots=True)
class ReachConfig:
    """Train variants of residual ∇-DB, and Adjoint Matching, on the analytic testbed to the end, and compare how near they get
    to the target. A stopped command continues where it was: finished runs are kept."""

    folder: Path = Path("runs/reach")
    """Output folder. It gets a folder per run, and table-STEPS.md and curves-STEPS.png for each number of steps."""
    variants: tuple[Variant, ...] = get_args(Variant)
    """published: residual ∇-DB with the paper's reverse residual. reference: its flow follows the pretrained model. averaged:
    the same, with an average of the flow in the target. adjoint: Adjoint Matching. exact-flow: the exact flow instead of a
    learned one."""
    dimension: Literal[2, 16] = 16
    """2 or 16, as for `python -m fastnabla.analytic`."""
    steps: tuple[int, ...] = (50, 100)
    """Numbers of sampler steps."""
    seeds: int = 3
    """Runs of each kind, with seeds 0, 1, …"""
    updates: int = 3200
    """Updates of "published" with each number of steps. The other variants make as many as cost the same in U."""
    samples: int = 4096
    """Samples per evaluation."""

    def __post_init__(self) -> None:
        require(bool(self.variants), "variants", self.variants, f"name at least one of {', '.join(get_args(Variant))}.")
        require(bool(self.steps), "steps", self.steps, "give at least one number.")
        require(self.seeds >= 1, "seeds", self.seeds, "must be at least 1.")

    def run_config(self, variant: Variant, steps: int, seed: int) -> AnalyticConfig:
        """The configuration of a run.

        Raises:
            ValueError: a setting is invalid.
        """
        published = self._config("published", steps, seed, self.updates)
        passes = self.updates * update_passes(published.training())
        updates = updates_within(self._config(variant, steps, seed, self.updates).training(), passes)
        return self._config(variant, steps, seed, updates)

    def _config(self, variant: Variant, steps: int, seed: int, updates: int) -> AnalyticConfig:
        config = settings("adjoint" if variant == "adjoint" else "residual-db")
        own: dict[str, Any] = {
            "published": {"objective": dataclasses.replace(config.objective, reverse_target="policy")},
            "averaged": {"flow_average": AVERAGE},
            "exact-flow": {"exact_flow": True},
        }.get(variant, {})
        common = {name: getattr(self, name) for name in ("dimension", "samples")}
        every = max(1, updates // 8)
        return dataclasses.replace(
            config, steps=steps, seed=seed, updates=updates, evaluate_every=every, **common, **own
        )


def run(config: AnalyticConfig, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Train in `folder`, unless a run of the same configuration has finished there. Returns the records of the evaluations,
    each with the "passes" so far.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: the folder has a finished run of another configuration.
    """
    finished = folder / "evaluations.json"
    if not finished.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        passes, evaluations = 0, []
        for record in train(Experiment(config), folder, console):
            passes += record.get("passes", 0)
            if record["phase"] == "evaluate":
                evaluations.append(record | {"passes": passes})
        write_file(finished, json.dumps(evaluations))
    elif (folder / "config.json").read_text(encoding="utf-8") != to_json(config):
        raise ValueError(
            f"folder = {str(folder.parent)!r}: {folder.name} is a run with other settings; use another folder."
        )
    return json.loads(finished.read_text(encoding="utf-8"))


def exact_rows(experiment: Experiment) -> dict[str, dict[str, float]]:
    """Measures of the pretrained model, of the target's exact score in the same sampler, and of exact draws."""
    pretrained = measure(experiment, experiment.evaluation_samples())
    experiment.policy.network = ExactScoreNetwork(experiment.target, alpha_bars(experiment.config.schedule))
    score = measure(experiment, experiment.evaluation_samples())
    target = experiment.target
    draws = floors(target, experiment.config.samples) | {
        "mode_width": 1.0,
        "effective_modes": effective_number(target.weights),
        "reward": target.mean_reward(experiment.reward),
    }
    return {"pretrained": pretrained, "exact score of the target": score, "exact draws": draws}


def row(
    name: str, runs: Sequence[dict[str, float]], floor: dict[str, float], seeds: str = "", updates: str = ""
) -> tuple[str, ...]:
    """A row of the table: means over `runs`, and [lowest, highest] of several."""

    def cell(key: str) -> str:
        unit, decimals = (floor[key], 1) if key in DISTANCES else (1.0, 2)
        values = [run[key] / unit for run in runs]
        mean = f"{sum(values) / len(values):.{decimals}f}"
        return mean if len(runs) == 1 else f"{mean} [{min(values):.{decimals}f}, {max(values):.{decimals}f}]"

    passes = runs[0].get("passes", 0)
    return (name, seeds, *map(cell, MEASURES), updates, f"{passes / 1000:,.0f}" if passes else "")


def save_curves(path: Path, curves: dict[str, list[list[dict[str, Any]]]], floor: dict[str, float]) -> None:
    """Plot the distances, in floors, by network passes: one line per run, one colour per variant."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, len(DISTANCES))
    for axis, (key, label) in zip(axes, zip(DISTANCES, COLUMNS, strict=False), strict=True):
        for number, (name, runs) in enumerate(curves.items()):
            for place, records in enumerate(runs):
                passes = [record["passes"] / 1e6 for record in records[1:]]
                values = [record[key] / floor[key] for record in records[1:]]
                axis.plot(passes, values, marker=".", color=f"C{number}", label=name if place == 0 else None)
        axis.axhline(1, linestyle="--", color="grey")
        axis.set(xlabel="network passes, millions", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def results(config: ReachConfig, steps: int, console: Console) -> bool:
    """Train all runs of `steps` sampler steps, seed by seed, and write their table and curves after each. Prints the table.
    Returns whether all runs finished.

    Raises:
        ValueError: see `run`.
    """
    experiment = Experiment(config.run_config("published", steps, 0))
    exact, floor = exact_rows(experiment), floors(experiment.target, config.samples)
    curves: dict[str, list[list[dict[str, Any]]]] = {variant: [] for variant in config.variants}
    for seed, variant in itertools.product(range(config.seeds), config.variants):
        try:
            folder = config.folder / f"{variant}-{steps}-seed-{seed}"
            curves[variant].append(run(config.run_config(variant, steps, seed), folder, console))
        except FloatingPointError as error:
            print_error(error)
        title = f"{config.dimension}-D, {steps} steps, {config.samples} samples"
        table = Table("", "seeds", *COLUMNS, title=title)
        for name in ("pretrained", "exact score of the target"):
            table.add_row(*row(name, [exact[name]], floor))
        for name, runs in curves.items():
            if runs:
                updates = str(config.run_config(name, steps, 0).updates)
                table.add_row(*row(name, [records[-1] for records in runs], floor, str(len(runs)), updates))
        table.add_row(*row("exact draws", [exact["exact draws"]], floor))
        write_file(config.folder / f"table-{steps}.md", markdown(table))
        save_curves(config.folder / f"curves-{steps}.png", curves, floor)
    console.print(markdown(table), markup=False, soft_wrap=True)
    return all(len(runs) == config.seeds for runs in curves.values())


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    console = command_console()
    try:
        require_single_process()
        config = tyro.cli(ReachConfig, prog="python -m fastnabla.analytic.reach", args=arguments)
        for steps, variant in itertools.product(config.steps, config.variants):
            config.run_config(variant, steps, 0)
        complete = [results(config, steps, console) for steps in config.steps]
    except ValueError as error:
        print_error(error)
        return 2
    console.print(f"tables and curves are in {config.folder}")
    return 0 if all(complete) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
