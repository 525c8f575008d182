"""`python -m fastnabla.analytic.compare`: compare methods on a known target, with equal updates and trajectories."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table

from fastnabla.run.folder import create_run_folder
from fastnabla.utils.console import command_console, print_error, quiet_libraries

quiet_libraries()

from fastnabla.analytic.config import SETTINGS, MethodName, settings  # noqa: E402
from fastnabla.analytic.experiment import Experiment  # noqa: E402
from fastnabla.analytic.measures import DISTANCES, effective_number, floors  # noqa: E402
from fastnabla.analytic.pictures import save_histograms  # noqa: E402
from fastnabla.analytic.training import measure, train  # noqa: E402
from fastnabla.config.training_sections import RolloutConfig  # noqa: E402
from fastnabla.distributed.launch import require_single_process  # noqa: E402
from fastnabla.run.table import markdown  # noqa: E402
from fastnabla.utils.durable import write_file  # noqa: E402
from fastnabla.utils.require import require  # noqa: E402

COLUMNS = ("mode masses, × floor", "sliced W₁, × floor", "modes", "width", "reward", "U / 1000", "core-seconds")


@dataclasses.dataclass(kw_only=True, slots=True)
class CompareConfig:
    """Train several methods on the analytic testbed, each with its default settings, and compare them in one table."""

    methods: tuple[MethodName, ...] = tuple(SETTINGS)
    """Methods to compare."""
    dimension: Literal[2, 16] = 2
    """2 or 16, as for `python -m fastnabla.analytic`."""
    updates: int = 300
    """Optimizer updates per method."""
    seed: int = 0
    """Seed of the training."""
    samples: int = 4096
    """Samples per evaluation."""
    rollout: RolloutConfig = dataclasses.field(
        default_factory=lambda: RolloutConfig(trajectories=128, fraction=0.5, updates=4, batch=1024)
    )
    folder: Path | None = None
    """Output folder, which must not exist. It gets a folder per method, table.md and samples.png. None: the next free
    runs/analytic-2d-001, …"""

    def __post_init__(self) -> None:
        require(bool(self.methods), "methods", self.methods, f"name at least one of {', '.join(SETTINGS)}.")

    def experiments(self) -> dict[MethodName, Experiment]:
        """Build the experiment of each method.

        Raises:
            ValueError: a setting is invalid.
        """
        fields = {name: getattr(self, name) for name in ("dimension", "updates", "seed", "samples", "rollout")}
        every = max(1, self.updates // 5)
        return {name: Experiment(settings(name, evaluate_every=every, **fields)) for name in self.methods}


def row(name: str, measures: dict[str, float], floor: dict[str, float], *costs: str) -> tuple[str, ...]:
    """A row of the table."""
    distances = (f"{measures[key] / floor[key]:.1f}" for key in DISTANCES)
    spread = (f"{measures[key]:.2f}" for key in ("effective_modes", "mode_width"))
    return (name, *distances, *spread, f"{measures['reward']:.3f}", *(costs or ("", "")))


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    console = command_console()
    try:
        require_single_process()
        config = tyro.cli(CompareConfig, prog="python -m fastnabla.analytic.compare", args=arguments)
        experiments = config.experiments()
        folder = create_run_folder(config.folder, f"analytic-{config.dimension}d")
    except ValueError as error:
        print_error(error)
        return 2

    # The pretrained model, which is the same for all methods.
    any_experiment = next(iter(experiments.values()))
    target = any_experiment.target
    floor = floors(target, config.samples)
    before = any_experiment.evaluation_samples()
    table = Table("method", *COLUMNS, title=f"{config.updates} updates, {config.samples} samples, seed {config.seed}")
    table.add_row(*row("pretrained", measure(any_experiment, before), floor))

    # Each method; table and picture are updated after each.
    samples = {"pretrained": before}
    for name, experiment in experiments.items():
        (folder / name).mkdir()
        started = time.process_time()
        try:
            records = train(experiment, folder / name, console)
        except FloatingPointError as error:
            print_error(error)
            table.add_row(name, "diverged", *[""] * (len(COLUMNS) - 1))
            continue
        seconds, samples[name] = time.process_time() - started, experiment.evaluation_samples()
        passes = sum(record["passes"] for record in records if record["phase"] == "train") / 1000
        table.add_row(*row(name, records[-1], floor, f"{passes:.0f}", f"{seconds:.0f}"))
        write_file(folder / "table.md", markdown(table))
        save_histograms(folder / "samples.png", samples, target)

    # Exact draws from the target, as the reference.
    exact = {"effective_modes": effective_number(target.weights), "mode_width": 1.0}
    measures: dict[str, Any] = floor | exact | {"reward": target.mean_reward(any_experiment.reward)}
    table.add_row(*row("exact draws", measures, floor))
    write_file(folder / "table.md", markdown(table))
    console.print(markdown(table), markup=False, soft_wrap=True)
    console.print(f"table.md and samples.png are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
