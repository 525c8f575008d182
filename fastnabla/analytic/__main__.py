"""`python -m fastnabla.analytic [--method NAME] [--dimension 2|16] [--field value …]`: finetune towards a known target."""

import dataclasses
import sys

import tyro

from fastnabla.run.folder import create_run_folder
from fastnabla.utils.console import command_console, print_error, quiet_libraries

quiet_libraries()

from fastnabla.analytic.config import AnalyticConfig, MethodName, settings  # noqa: E402
from fastnabla.analytic.experiment import Experiment  # noqa: E402
from fastnabla.analytic.training import train  # noqa: E402
from fastnabla.distributed.launch import require_single_process  # noqa: E402


@dataclasses.dataclass
class _Chosen:
    method: MethodName = "residual-db"


def parse(arguments: list[str]) -> AnalyticConfig:
    """Parse a command line. `--method` selects the defaults of the other options."""
    chosen, _ = tyro.cli(_Chosen, args=arguments, return_unknown_args=True, add_help=False)
    default = settings(chosen.method)
    return tyro.cli(AnalyticConfig, default=default, prog="python -m fastnabla.analytic", args=arguments)


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    console = command_console()
    try:
        require_single_process()
        config = parse(arguments)
        experiment = Experiment(config)
        run = create_run_folder(config.run, f"analytic-{config.dimension}d-{config.method}")
    except ValueError as error:
        print_error(error)
        return 2
    console.print(f"writing to {run}")
    try:
        train(experiment, run, console)
    except FloatingPointError as error:
        print_error(error)
        return 1
    console.print(f"pictures, table and metrics are in {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
