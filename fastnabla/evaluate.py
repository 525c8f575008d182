"""`python -m fastnabla.evaluate RUN…`: finished runs against the distribution that finetuning promises."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from fastnabla.utils.console import print_error, print_plain, quiet_libraries

quiet_libraries()

from fastnabla.evaluation.report import evaluate_run, file_of, result_tables  # noqa: E402
from fastnabla.evaluation.run import EvaluationOptions  # noqa: E402


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
