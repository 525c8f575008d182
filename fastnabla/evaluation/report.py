"""The results file that an evaluation writes into the run folder, and tables of results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastnabla.evaluation.options import EvaluationOptions, file_of
from fastnabla.evaluation.run import RunEvaluation
from fastnabla.metrics.joint_entropy import CEILINGS
from fastnabla.utils.durable import write_file
from fastnabla.utils.printable import printable
from fastnabla.utils.progress import TaskProgress

DIVERGENCES = {
    "KL along trajectories, nats": "nats",
    "KL along trajectories without the last two steps, nats": "without_last_two",
}
"""Label → name in the results."""
PER_PROMPT_FID = "frechet_to_reference_within_prompts"
"""What arXiv 2412.07775 reports as FID."""


def evaluate_run(run: Path, options: EvaluationOptions, others: Sequence[Path], console: Console) -> dict[str, Any]:
    """Measure one run, write the results into its folder and return them.

    Args:
        run, options, others: see `RunEvaluation`.
        console: shows the progress.

    Raises:
        ValueError: the folder is not a finished run, or cannot be written, or a model, reward or probe cannot be built.
    """
    evaluation = RunEvaluation(run, options, others)
    with TaskProgress(console, printable(run.name), evaluation.steps) as progress:
        result = evaluation.measure(progress.advance)
    write_file(run / file_of(options), json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def result_tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    """One table per group of prompts, with a column per run."""
    names = list(dict.fromkeys(name for result in results for name in result["groups"]))
    return [_table(name, results) for name in names]


def _table(group: str, results: Sequence[dict[str, Any]]) -> Table:
    prompts = "training prompts" if group == "trained" else "held-out prompts"
    table = Table(title=f"{prompts}: pretrained → finetuned (finite-sample floor)")
    table.add_column("measure")
    columns = []
    for result in results:
        table.add_column(_label(Path(result["run"])), justify="right")
        columns.append(_cells(result["groups"][group], result["settings"]) if group in result["groups"] else {})
    for section in ("", "tilted", "same_reward"):
        labels = dict.fromkeys(label for cells in columns for place, label in cells if place == section)
        for label in labels:
            table.add_row(escape(label), *(cells.get((section, label), "") for cells in columns))
        table.add_section()
    return table


def _label(run: Path) -> str:
    """Name of a run folder, as rich markup."""
    return escape(printable(run.name))


def _cells(group: dict[str, Any], settings: dict[str, Any]) -> dict[tuple[str, str], str]:
    """The column of a run: section and label → text."""
    before, after = group["pretrained"], group["finetuned"]
    cells = {("", name): f"{before[name]:.4g} → {after[name]:.4g}" for name in after}
    for name, floor in group["reference_floor"].items():
        spread = "" if floor["std"] is None else f" ± {floor['std']:.2g}"
        cells["", name] += f" ({floor['mean']:.3g}{spread})"
    if PER_PROMPT_FID in after:
        cells["", f"{PER_PROMPT_FID} (the paper's per-prompt FID)"] = cells.pop(("", PER_PROMPT_FID))
    for name in CEILINGS:
        ceiling = group[f"{name}_ceiling"]
        shares = " → ".join(f"{model[name] / ceiling:.1%}" for model in (before, after))
        cells["", f"{name}, share of its ceiling"] = f"{shares} (of {ceiling:.3f})"
    divergence = group["divergence"]
    for label, name in DIVERGENCES.items():
        if divergence is None:
            cells["", label] = "none: the sampler has no noise"
            continue
        error = divergence["standard_error" if name == "nats" else f"{name}_standard_error"]
        cells["", label] = f"{divergence[name]:.4g} ± {error:.2g}"
    for section, title in (("tilted", "target"), ("same_reward", "target of equal reward")):
        target = group["targets"][section]
        if target is None:
            no_prior = section == "tilted" and settings["target_beta"] is None
            cells[section, f"{title}: β"] = f"none: λ = {settings['prior_weight']:g}" if no_prior else "out of reach"
            continue
        cells[section, f"{title}: β"] = f"{target['beta']:.4g}"
        cells[section, f"{title}: effective samples"] = f"{target['ess']:.0f} of {target['reference_samples']}"
        cells[section, f"{title}: effective samples, worst prompt"] = f"{target['smallest_ess']:.1f}"
        cells[section, f"{title}: reward"] = f"{target['reward']:.4g}"
        if target["pairwise_distance"] is not None:
            cells[section, f"{title}: pairwise_distance"] = f"{target['pairwise_distance']:.4g}"
        cells[section, f"{title}: KL from the prior, nats"] = f"{target['divergence']:.4g}"
        for name, floor in target["floor"].items():
            text = f"{target['pretrained'][name]:.3g} → {target['finetuned'][name]:.3g} ({floor:.2g})"
            cells[section, f"{title}: {name}"] = text
    return cells
