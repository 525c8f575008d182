"""The training loop of the analytic testbed, for all methods: rollout → updates → evaluation."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastnabla.analytic.experiment import Experiment
from fastnabla.analytic.measures import distances, effective_modes, effective_number, floors, mode_width
from fastnabla.analytic.pictures import save_pictures
from fastnabla.config.train import to_json
from fastnabla.run.tracker import Tracker
from fastnabla.trajectories.sources import learning_order
from fastnabla.utils.progress import TaskProgress

REMEDY = "lower optimizer.learning_rate or objective.beta"


def train(experiment: Experiment, run: Path, console: Console | None = None) -> list[dict[str, Any]]:
    """Train `experiment`, write everything into the folder `run`, and return the metric records.

    Args:
        experiment: the experiment to train.
        run: an empty folder.
        console: shows progress and the final table; None for no output.

    Raises:
        FloatingPointError: the loss, a gradient or a measure of the samples is not finite.
    """
    config, console = experiment.config, console or Console(quiet=True)
    (run / "config.json").write_text(to_json(config), encoding="utf-8")
    tracker = Tracker(run, "none", {})
    before = after = experiment.evaluation_samples()
    tracker.log("evaluate", 0, measure(experiment, before))
    with TaskProgress(console, "updates", config.updates) as progress:
        for update, metrics in enumerate(updates(experiment), 1):
            tracker.log("train", update, metrics)
            status = None
            if update % config.evaluate_every == 0 or update == config.updates:
                after = experiment.evaluation_samples()
                measures = measure(experiment, after)
                tracker.log("evaluate", update, measures)
                if not all(map(math.isfinite, measures.values())):
                    raise FloatingPointError(f"the samples are not finite after update {update}; {REMEDY}.")
                status = f"mode-mass error {measures['mode_mass_error']:.3f}"
            progress.advance(status=status)
    table = comparison(experiment, before, after)
    console.print(table)
    with (run / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(table)
    save_pictures(run, experiment, before, after, tracker.records)
    tracker.close()
    return tracker.records


def updates(experiment: Experiment) -> Iterator[dict[str, float]]:
    """Train `experiment` and yield the metrics of each update, with its network passes, including those of its rollout.

    Raises:
        FloatingPointError: the loss or a gradient is not finite.
    """
    config, source, counter = experiment.config, experiment.source, experiment.policy.passes
    for update in range(config.updates):
        rollout_index, place = divmod(update, config.rollout.updates_per_rollout)
        before = counter.rows
        if place == 0:
            rollout = source.collect(rollout_index)
        trajectories = learning_order(config.seed, rollout_index, config.rollout)[place]
        experiment.step.update = update
        report = experiment.step(source.select(rollout_index, trajectories, again=place >= config.rollout.updates))
        norms = experiment.optimizer.update()
        experiment.step.after_update()
        losses = {f"loss_{name}": value for name, value in report.losses.items()}
        numbers = {name: value.item() for name, value in (report.statistics | norms | losses).items()}
        yield rollout | numbers | {"passes": counter.rows - before}
        if not all(math.isfinite(numbers[name]) for name in (*losses, *norms)):
            raise FloatingPointError(f"the loss or a gradient is not finite in update {update + 1}; {REMEDY}.")
        if place + 1 == config.rollout.updates_per_rollout:
            source.finish()


def measure(experiment: Experiment, samples: Tensor) -> dict[str, float]:
    """Measure `samples [N, D]`: distances from the target, spread over its modes, and mean reward."""
    return distances(samples, experiment.target) | {
        "effective_modes": effective_modes(samples, experiment.target),
        "mode_width": mode_width(samples, experiment.target),
        "reward": experiment.reward(samples, ()).mean().item(),
    }


def comparison(experiment: Experiment, before: Tensor, after: Tensor) -> Table:
    """Table that compares samples `[N, D]` of the pretrained and the finetuned policy with the exact distributions.

    Distances are also given in units of their Monte-Carlo floor.
    """
    config, target = experiment.config, experiment.target
    table = Table(title=f"distances (in units of the floor) of {len(before)} samples, after {config.updates} updates")
    for column in ("samples of", "against", "mode masses", "sliced W₁", "modes", "width", "reward"):
        table.add_column(column, justify="left" if column in ("samples of", "against") else "right")
    rows = [
        ("pretrained", "its mixture", before, experiment.reference),
        ("pretrained", "target", before, target),
        (config.method, "target", after, target),
    ]
    for name, against, samples, mixture in rows:
        values, floor = distances(samples, mixture), floors(mixture, len(samples))
        cells = [f"{value:.4f} ({value / floor[key]:.1f})" for key, value in values.items()]
        spread = (f"{effective_modes(samples, mixture):.2f}", f"{mode_width(samples, mixture):.2f}")
        table.add_row(name, against, *cells, *spread, f"{experiment.reward(samples, ()).mean().item():.3f}")
    cells = [f"{value:.4f} (1)" for value in floors(target, len(before)).values()]
    spread = (f"{effective_number(target.weights):.2f}", "1.00")
    table.add_row("exact draws", "target", *cells, *spread, f"{target.mean_reward(experiment.reward):.3f}")
    return table
