"""`python -m fastnabla.study PROTOCOL.toml`: tune methods alike, train them with fresh seeds, measure and compare them."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from fastnabla.distributed.launch import require_single_process
from fastnabla.study.protocol import Protocol
from fastnabla.utils.console import command_console, print_error, print_plain, quiet_libraries
from fastnabla.utils.require import require


@dataclasses.dataclass(kw_only=True, slots=True)
class StudyConfig:
    """Tune every method of a protocol alike, train the chosen settings with fresh seeds, measure them, and write the page of
    results beside the protocol, together with a record of each run. Running the same command again trains the runs without a
    record; seeds and methods may be added. docs/comparison.md explains the steps."""

    protocol: tyro.conf.Positional[Path]
    """TOML file, such as docs/results/comparison.toml."""
    run: Path | None = None
    """Folder of the study, in which runs/METHOD,LEARNING_RATE-seed-N are ordinary run folders. None: runs/study-NAME, by the
    protocol's file name."""
    jobs: int = 1
    """Runs at the same time, each in its own process with an equal share of the CPU cores and, while there are enough, its
    own GPU."""
    only: tuple[str, ...] = ()
    """Train, measure and record only these runs (draft,0.001-seed-0, …) and write no page. Use it to share a folder between several
    machines."""
    page_only: bool = False
    """Train and measure nothing: record the runs that have been measured, write the page from the records, and say which runs are
    missing. It needs no folder of the study."""
    dry_run: bool = False
    """Check all settings, print what each run would spend, and stop."""

    def __post_init__(self) -> None:
        require(self.jobs >= 1, "jobs", self.jobs, "must be at least 1.")

    @property
    def folder(self) -> Path:
        """Folder of the study."""
        return self.run or Path("runs") / f"study-{self.protocol.stem}"


def study(config: StudyConfig, arguments: Sequence[str], console: Console) -> int:
    """Do what the protocol says, and return the exit status.

    Args:
        config: parsed options.
        arguments: the command line, which is repeated for each process if there are several.
        console: shows plan, progress and the page's path.

    Raises:
        ValueError: the protocol or a run's setting is invalid, a run cannot be built, or there is nothing to write.
    """
    protocol = Protocol.read(config.protocol)
    # These modules import torch, so they are imported only after the protocol has been checked.
    from fastnabla.study.page import write_page
    from fastnabla.study.records import records_file
    from fastnabla.study.results import read_results
    from fastnabla.study.running import run_named, run_study

    console.print(_plan(protocol))
    if config.dry_run:
        return 0
    folder, file = config.folder, records_file(config.protocol)
    if config.only:
        return run_named(config.only, protocol, folder, file, console)
    if not config.page_only and (status := run_study(protocol, folder, file, config.jobs, arguments, console)):
        return status
    results = read_results(protocol, folder, file)
    for remark in results.remarks:
        print_plain(console, remark)
    paths = write_page(results, config.protocol)
    print_plain(console, f"wrote {', '.join(map(str, paths))}")
    return 0


def _plan(protocol: Protocol) -> Table:
    """Table of the planned cost of each method."""
    from fastnabla.cost.budget import planned_decodes, update_passes
    from fastnabla.study.plan import run_config

    tuning = len(protocol.tuning.seeds)
    table = Table(title=f"{protocol.preset}, {protocol.passes:,.0f} U per run", title_justify="left")
    for column in ("method", "tuning runs", "final runs, at most", "updates", "U per run", "decodes per run"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in protocol.methods:
        config = run_config(protocol, method, method.learning_rates[0])
        spent = (update_passes(config) * config.updates, planned_decodes(config))
        rates = len(method.learning_rates)
        most = len(protocol.final.seeds) * min(rates, len(protocol.final.allowed_losses))
        counts = (tuning * rates if method.is_tuned else 0, most, config.updates)
        table.add_row(method.name, *(f"{value:,.0f}" for value in (*counts, *spent)))
    return table


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    console = command_console()
    quiet_libraries()
    try:
        require_single_process()
        config = tyro.cli(StudyConfig, args=arguments, prog="python -m fastnabla.study")
        return study(config, arguments, console)
    except (ValueError, FileNotFoundError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; run the same command to continue")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
