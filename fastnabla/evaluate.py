"""`python -m fastnabla.evaluate RUN…`: compare finished runs with the distribution that finetuning should reach."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from fastnabla.distributed.launch import require_single_process
from fastnabla.evaluation.options import EvaluationOptions, file_of
from fastnabla.utils.console import command_console, print_error, print_plain, quiet_libraries
from fastnabla.utils.quick_imports import quick_imports


@dataclasses.dataclass(kw_only=True, slots=True)
class EvaluateConfig(EvaluationOptions):
    """Compare finetuned models with their pretrained models and with p_ref · exp(βr), estimated from samples of the
    pretrained model. Writes evaluation.json into every run folder, or evaluation-NAME.json for --weights NAME other than
    raw. docs/evaluation.md explains the numbers."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN…")]
    """Run folders of `python -m fastnabla.train`."""

    def __post_init__(self) -> None:
        EvaluationOptions.__post_init__(self)
        if not self.runs:
            raise ValueError("runs: name at least one run folder.")


def evaluate(config: EvaluateConfig, console: Console) -> None:
    """Measure `config.runs` and print their tables. Each run's results are written as soon as they are complete.

    Raises:
        ValueError: a folder is not a finished run, or a model, reward or probe cannot be built. The results of earlier
            runs are kept.
    """
    # These modules import torch, so they are imported only after the command line has been parsed.
    with quick_imports():
        from fastnabla.evaluation.report import evaluate_run, result_tables

    results = []
    for run in config.runs:
        others = [other for other in config.runs if other != run]
        results.append(evaluate_run(run, config, others, console))
    for table in result_tables(results):
        console.print(table)


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    console = command_console()
    quiet_libraries()
    try:
        require_single_process()
        config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m fastnabla.evaluate")
        evaluate(config, console)
    except ValueError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the reference samples drawn so far are kept. Run the same command to continue.")
        return 130
    print_plain(console, "wrote " + ", ".join(str(run / file_of(config)) for run in config.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
