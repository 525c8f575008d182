"""`python -m fastnabla.evaluate RUN…`: finished runs against the distribution that finetuning promises."""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastnabla.run.tracker import print_error, print_plain, progress_bar, quiet_libraries

quiet_libraries()

from fastnabla.evaluation.run import EvaluationOptions, RunEvaluation  # noqa: E402
from fastnabla.utils.durable import write_file  # noqa: E402
from fastnabla.utils.printable import printable  # noqa: E402

FILE = "evaluation.json"


@dataclasses.dataclass(kw_only=True, slots=True)
class EvaluateConfig(EvaluationOptions):
    """Measure finetuned models beside their pretrained ones, and beside p_ref · exp(βr) as the pretrained model's samples
    show it. Writes evaluation.json (of other weights than the last, evaluation-NAME.json) into every run folder; docs/evaluation.md
    explains the numbers."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN…")]
    """Run folders of `python -m fastnabla.train`."""

    def __post_init__(self) -> None:
        EvaluationOptions.__post_init__(self)
        if not self.runs:
            raise ValueError("runs: name at least one run folder.")


def evaluate(config: EvaluateConfig, console: Console) -> list[dict[str, Any]]:
    """Measure `config.runs`, writing each one's results as soon as they are there; all results.

    Raises:
        ValueError: a folder is not a finished run, or a model, reward or probe cannot be built. Runs before it are done.
    """
    return [evaluate_run(run, config, [other for other in config.runs if other != run], console) for run in config.runs]


def evaluate_run(run: Path, options: EvaluationOptions, others: Sequence[Path], console: Console) -> dict[str, Any]:
    """Measure one run, writing its results; the results.

    Args:
        run, options, others: see `RunEvaluation`.
        console: where progress goes.

    Raises:
        ValueError: the folder is not a finished run, or a model, reward or probe cannot be built.
    """
    with progress_bar(console) as progress:
        evaluation = RunEvaluation(run, options, others)
        task = progress.add_task(_label(run), total=evaluation.steps, status="")
        result = evaluation.measure(functools.partial(progress.advance, task))
        progress.update(task, completed=evaluation.steps)
    write_file(run / file_of(options), json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def file_of(options: EvaluationOptions) -> str:
    """Name of the file that the results go to."""
    return FILE if options.weights == "raw" else f"evaluation-{options.weights}.json"


def result_tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    """A table for each group of prompts, with a column for each run."""
    names = list(dict.fromkeys(name for result in results for name in result["groups"]))
    return [_table(name, results) for name in names]


def _table(group: str, results: Sequence[dict[str, Any]]) -> Table:
    prompts = "prompts that were trained on" if group == "trained" else "held-out prompts"
    table = Table(title=f"{prompts}: pretrained → finetuned (floor of the finite samples)")
    table.add_column("measure")
    columns = []
    for result in results:
        table.add_column(_label(Path(result["run"])), justify="right")
        columns.append(_cells(result["groups"][group]) if group in result["groups"] else {})
    for section in ("", "tilted", "same_reward"):
        labels = dict.fromkeys(label for cells in columns for place, label in cells if place == section)
        for label in labels:
            table.add_row(escape(label), *(cells.get((section, label), "") for cells in columns))
        table.add_section()
    return table


def _label(run: Path) -> str:
    """Name of a run folder, as markup."""
    return escape(printable(run.name))


def _cells(group: dict[str, Any]) -> dict[tuple[str, str], str]:
    """A run's column: section and label → text."""
    before, after = group["pretrained"], group["finetuned"]
    cells = {("", name): f"{before[name]:.4g} → {after[name]:.4g}" for name in after}
    divergence = group["divergence"]
    cells["", "KL along trajectories, nats"] = f"{divergence['nats']:.4g} ± {divergence['standard_error']:.2g}"
    for section, title in (("tilted", "target"), ("same_reward", "target of equal reward")):
        target = group["targets"][section]
        if target is None:
            cells[section, f"{title}: β"] = "out of reach"
            continue
        cells[section, f"{title}: β"] = f"{target['beta']:.4g}"
        cells[section, f"{title}: effective samples"] = f"{target['ess']:.0f} of {target['reference_samples']}"
        cells[section, f"{title}: fewest of a prompt"] = f"{target['smallest_ess']:.1f}"
        cells[section, f"{title}: reward"] = f"{target['reward']:.4g}"
        if target["pairwise_distance"] is not None:
            cells[section, f"{title}: pairwise_distance"] = f"{target['pairwise_distance']:.4g}"
        cells[section, f"{title}: KL from the prior, nats"] = f"{target['divergence']:.4g}"
        for name, floor in target["floor"].items():
            text = f"{target['pretrained'][name]:.3g} → {target['finetuned'][name]:.3g} ({floor:.2g})"
            cells[section, f"{title}: {name}"] = text
    return cells


def main(arguments: list[str]) -> int:
    """Run the command line; the exit status."""
    console = Console()
    try:
        config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m fastnabla.evaluate")
        results = evaluate(config, console)
    except ValueError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        console.print(
            "interrupted; the reference samples drawn so far are kept, and the same command goes on from them"
        )
        return 130
    for table in result_tables(results):
        console.print(table)
    print_plain(console, "wrote " + ", ".join(str(run / file_of(config)) for run in config.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
