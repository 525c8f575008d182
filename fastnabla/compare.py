"""`python -m fastnabla.compare --methods residual-db draft …`: compare methods at the same budget."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import tyro
from rich.console import Console

from fastnabla.config.methods import MethodName
from fastnabla.config.model_sections import TESTBED
from fastnabla.config.presets import PRESETS
from fastnabla.distributed.launch import require_single_process
from fastnabla.evaluation.options import EvaluationOptions
from fastnabla.run.weights import weights_folder
from fastnabla.utils.console import command_console, print_error, quiet_libraries
from fastnabla.utils.quick_imports import quick_imports
from fastnabla.utils.require import require


@dataclasses.dataclass(kw_only=True, slots=True)
class CompareConfig:
    """Train several methods, or variants of one, with the same budget of network passes. Evaluate them during training on
    the same prompts and noise. Write comparison.html, which shows reward against cost, reward against diversity and
    distance from the prior, and samples at equal reward. Each method and seed is an ordinary run folder. Running the same
    command again continues where it stopped; methods and seeds may be added. docs/comparison.md explains the results."""

    preset: tyro.extras.literal_type_from_choices(PRESETS) = TESTBED
    """Preset of `python -m fastnabla.train` from which all runs start."""
    methods: tuple[str, ...] = tuple(method for method in get_args(MethodName) if method != "vgg-flow")
    """Methods (docs/objectives.md) and variants of methods, METHOD,FIELD=VALUE,FIELD=VALUE,…, to compare. An ablation, for
    example: residual-db residual-db,flow.kind=none residual-db,objective.beta=30. If no budget is given, the first one sets
    it. Default: all but vgg-flow, which is for flow models alone."""
    seeds: int = 1
    """Runs per method, with seeds 0, 1, … Runs vary a lot between seeds: with one seed, small differences mean nothing."""
    run: Path | None = None
    """Folder of the comparison. Its runs are METHOD-seed-N, or METHOD,FIELD=VALUE-seed-N. None: runs/compare-PRESET."""
    passes: float | None = None
    """Budget of each run in U, where 1 U is a UNet pass over the guided rows of a transition. Rollouts count. Each method
    makes as many updates as fit into the budget, but at least those of one rollout. None: the cost of the first method with
    the preset's updates."""
    updates: int | None = None
    """Number of updates of every run, whatever they cost; replaces `passes`."""
    points: int = 6
    """Largest number of evaluations during each run. Each samples evaluation.prompts × evaluation.samples trajectories."""
    set: tuple[str, ...] = ()
    """Changes to the preset: FIELD=VALUE for all methods (rollout.trajectories=16) or METHOD.FIELD=VALUE for one method
    (draft.optimizer.learning_rate=3e-3). The fields are those of `python -m fastnabla.train PRESET --help`. Changes to a run
    that has started are refused."""
    evaluate: bool = False
    """Also compare the finished runs with p_ref · exp(βr), as `python -m fastnabla.evaluate` does."""
    target: EvaluationOptions = dataclasses.field(
        default_factory=lambda: EvaluationOptions(samples_per_prompt=8, reference_samples=64)
    )
    """Options for `evaluate`, with small default numbers of samples."""
    jobs: int = 1
    """Runs trained at the same time, each in its own process with an equal share of the CPU cores and, while there are
    enough, its own GPU."""
    only: tuple[str, ...] = ()
    """Train only these runs (draft-seed-0, …) and write no page. Use it to share a folder between several machines."""
    dry_run: bool = False
    """Print the planned cost of each method, and stop."""

    def __post_init__(self) -> None:
        require(self.jobs >= 1, "jobs", self.jobs, "must be at least 1.")

    @property
    def folder(self) -> Path:
        """Folder of the comparison."""
        return self.run or Path("runs") / f"compare-{self.preset}"


def compare(config: CompareConfig, arguments: Sequence[str], console: Console) -> int:
    """Train what is missing, evaluate, write the results and print their tables. Returns the exit status.

    Args:
        config: parsed options.
        arguments: the command line, which is repeated for each process if there are several.
        console: shows plan, progress and tables.

    Raises:
        ValueError: a setting is invalid, a folder belongs to another run, a run's model, prompts, reward or probe cannot be
            built, or no run has results.
    """
    # These modules import torch, so they are imported only after the command line has been parsed.
    with quick_imports():
        from fastnabla.comparison.evaluations import evaluate_all
        from fastnabla.comparison.plan import PlannedRun, make_plan
        from fastnabla.comparison.report import NAME, Report
        from fastnabla.comparison.training import train_all, train_in_processes

    # Plan.
    plan = make_plan(
        config.preset,
        config.methods,
        config.seeds,
        config.folder,
        passes=config.passes,
        updates=config.updates,
        points=config.points,
        settings=config.set,
    )
    if config.only:
        plan = plan.restricted_to(config.only)
    plan.check_folders()
    for run in plan.runs if config.evaluate else ():
        weights_folder(run.folder, config.target.weights, run.config.optimizer.ema)
    console.print(plan.table())
    if config.dry_run:
        return 0

    # Train, and update the report after each run.
    ended = [run for run in plan.runs if run.done]
    waiting = [run for run in plan.runs if not run.done]

    def on_end(run: PlannedRun) -> None:
        ended.append(run)
        if not config.only:
            Report.read(plan, ended, {}).write(config.folder)

    def command(run: PlannedRun) -> list[str]:
        return [sys.executable, "-m", "fastnabla.compare", *arguments, "--only", run.folder.name]

    if min(config.jobs, len(waiting)) > 1:
        status = train_in_processes(waiting, config.jobs, command, console, on_end)
    else:
        status = train_all(waiting, console, on_end)
    if status or config.only:
        return status

    # Evaluate and report.
    evaluations = evaluate_all(ended, config.target, console) if config.evaluate else {}
    report = Report.read(plan, ended, evaluations)
    report.write(config.folder)
    if not report.points:
        raise ValueError(f"nothing to compare: {' '.join(report.remarks)}")
    for sheet in report.sheets():
        console.print(sheet.markdown(), markup=False, soft_wrap=True)
    console.print(f"wrote {config.folder / NAME}.html, .md, .json", markup=False, soft_wrap=True)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    console = command_console()
    quiet_libraries()
    try:
        require_single_process()
        config = tyro.cli(CompareConfig, args=arguments, prog="python -m fastnabla.compare")
        return compare(config, arguments, console)
    except (ValueError, FileNotFoundError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; run the same command to continue")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
