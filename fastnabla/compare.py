"""`python -m fastnabla.compare --methods residual-db draft …`: methods at one budget, and the picture of what they keep."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from fastnabla.utils.console import print_error, quiet_libraries

quiet_libraries()

from fastnabla.comparison.plan import Plan, PlannedRun, make_plan  # noqa: E402
from fastnabla.comparison.report import NAME, Report  # noqa: E402
from fastnabla.comparison.training import train_all, train_in_processes  # noqa: E402
from fastnabla.config.methods import METHODS  # noqa: E402
from fastnabla.config.presets import PRESETS  # noqa: E402
from fastnabla.config.sections import TESTBED  # noqa: E402
from fastnabla.evaluation.report import FILE, evaluate_run  # noqa: E402
from fastnabla.evaluation.run import EvaluationOptions  # noqa: E402
from fastnabla.utils.require import require  # noqa: E402


@dataclasses.dataclass(kw_only=True, slots=True)
class CompareConfig:
    """Train several methods, or variants of one, with the same budget of network passes, evaluate them along the way on
    the same prompts and noise, and write comparison.html: reward by cost, reward against diversity and prior, samples at
    equal reward. Each method and seed is an ordinary run folder. The same command again goes on where it stopped, and adds
    what is new to it: methods, and seeds. docs/comparison.md says how to read the result."""

    preset: tyro.extras.literal_type_from_choices(PRESETS) = TESTBED
    """Preset of `python -m fastnabla.train` that all runs start from."""
    methods: tuple[str, ...] = tuple(METHODS)
    """What is compared: methods, whose equations and costs are in docs/objectives.md, and variants of them,
    METHOD,FIELD=VALUE,FIELD=VALUE,…, as in an ablation: residual-db residual-db,flow.kind=none
    residual-db,objective.beta=30. Without a budget the first one sets it."""
    seeds: int = 1
    """Runs of each method, of seeds 0, 1, … Runs differ much by seed: with one, small differences mean nothing."""
    run: Path | None = None
    """Folder of the comparison; its runs are METHOD-seed-N, or METHOD,FIELD=VALUE-seed-N. None: runs/compare-PRESET."""
    passes: float | None = None
    """Budget of each run in U, passes of the UNet over a transition's guided rows, rollouts included. Each method makes as
    many updates as fit into it, one rollout's at least. None: what the first method spends in the preset's updates."""
    updates: int | None = None
    """Instead of `passes`: updates of every run, whatever they spend."""
    points: int = 6
    """Most evaluations along each run; each takes evaluation.prompts × evaluation.samples trajectories."""
    set: tuple[str, ...] = ()
    """Changes of the preset, FIELD=VALUE for all methods (rollout.trajectories=16) or METHOD.FIELD=VALUE for one
    (draft.optimizer.learning_rate=3e-3); fields are those of `python -m fastnabla.train PRESET --help`. Changes of a run
    that was begun are refused."""
    evaluate: bool = False
    """Measure the finished runs beside p_ref · exp(βr) too, as `python -m fastnabla.evaluate` does."""
    target: EvaluationOptions = dataclasses.field(
        default_factory=lambda: EvaluationOptions(samples_per_prompt=8, reference_samples=64)
    )
    """How, with `evaluate`; small numbers of samples by default."""
    jobs: int = 1
    """Runs trained at a time, each in a process with its share of the cores, and a GPU of its own as long as there are
    some."""
    only: tuple[str, ...] = ()
    """Train these runs (draft-seed-0, …) and write no page, as one of several machines that share a folder would."""
    dry_run: bool = False
    """Print what each method would spend, and stop."""

    def __post_init__(self) -> None:
        require(self.jobs >= 1, "jobs", self.jobs, "must be at least 1.")

    def plan(self) -> Plan:
        """The runs, whose folders are theirs or free.

        Raises:
            ValueError: a setting is wrong, or a folder is another run's.
        """
        plan = make_plan(
            self.preset,
            self.methods,
            self.seeds,
            self.folder,
            passes=self.passes,
            updates=self.updates,
            points=self.points,
            settings=self.set,
        )
        if self.only:
            plan = plan.restricted_to(self.only)
        plan.check_folders()
        return plan

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.run or Path("runs") / f"compare-{self.preset}"


def train(
    config: CompareConfig,
    plan: Plan,
    arguments: Sequence[str],
    console: Console,
    ended: Callable[[PlannedRun], None],
) -> int:
    """Train the runs of the `plan` that are not done; the exit status.

    Raises:
        ValueError: a run's model, prompts, reward or probe cannot be built.
    """
    waiting = [run for run in plan.runs if not run.done]
    jobs = min(config.jobs, len(waiting))
    if jobs <= 1:
        return train_all(waiting, console, ended)

    def command(run: PlannedRun) -> list[str]:
        return [sys.executable, "-m", "fastnabla.compare", *arguments, "--only", run.folder.name]

    return train_in_processes(waiting, jobs, command, console, ended)


def evaluated(
    runs: Sequence[PlannedRun], options: EvaluationOptions, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Results of `fastnabla.evaluate` of the runs that are done, by variant and seed; measured where a run has none of these
    `options`."""
    runs = [run for run in runs if run.done]
    folders, results = [run.folder for run in runs], {}
    for run in runs:
        result = stored_evaluation(run.folder, options)
        if result is None:
            others = [folder for folder in folders if folder != run.folder]
            result = evaluate_run(run.folder, options, others, console)
        results.setdefault(run.variant, []).append(result)
    return results


def stored_evaluation(folder: Path, options: EvaluationOptions) -> dict[str, Any] | None:
    """What `fastnabla.evaluate` has written of the run in `folder` with these options; None if it has not."""
    if not (folder / FILE).exists():
        return None
    result = json.loads((folder / FILE).read_text(encoding="utf-8"))
    wanted = {name: value for name, value in dataclasses.asdict(options).items() if (name, value) != ("probe", None)}
    return result if result["settings"].items() >= wanted.items() else None


def main(arguments: Sequence[str]) -> int:
    """Run the command line; the exit status."""
    console = Console()
    try:
        config = tyro.cli(CompareConfig, args=arguments, prog="python -m fastnabla.compare")
        plan = config.plan()
        console.print(plan.table())
        if config.dry_run:
            return 0
        ended = [run for run in plan.runs if run.done]

        def write_so_far(run: PlannedRun) -> None:
            ended.append(run)
            if not config.only:
                Report.read(plan, ended, {}).write(config.folder)

        status = train(config, plan, arguments, console, write_so_far)
        if status or config.only:
            return status
        evaluations = evaluated(ended, config.target, console) if config.evaluate else {}
        report = Report.read(plan, ended, evaluations)
        report.write(config.folder)
        if not report.points:
            raise ValueError(f"nothing to compare: {' '.join(report.remarks)}")
    except (ValueError, FileNotFoundError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; go on with: the same command")
        return 130
    for sheet in report.sheets():
        console.print(sheet.markdown(), markup=False, soft_wrap=True)
    console.print(f"wrote {config.folder / NAME}.html, .md, .json", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
