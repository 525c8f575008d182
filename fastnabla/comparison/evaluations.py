"""Results of `fastnabla.evaluate` for the finished runs of a comparison."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fastnabla.comparison.plan import PlannedRun
from fastnabla.evaluation.options import FILE, FORMAT, EvaluationOptions
from fastnabla.evaluation.report import evaluate_run


def evaluate_all(
    runs: Sequence[PlannedRun], options: EvaluationOptions, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Results of the finished runs: variant → one per seed. Runs are measured unless they have results with the same
    options."""
    runs = [run for run in runs if run.done]
    results: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        result = stored_evaluation(run.folder, options)
        if result is None:
            others = [other.folder for other in runs if other.folder != run.folder]
            result = evaluate_run(run.folder, options, others, console)
        results.setdefault(run.variant, []).append(result)
    return results


def stored_evaluation(folder: Path, options: EvaluationOptions) -> dict[str, Any] | None:
    """The results stored in the run folder, if they were measured with these options by this version; otherwise None."""
    if not (folder / FILE).exists():
        return None
    result = json.loads((folder / FILE).read_text(encoding="utf-8"))
    wanted = {name: value for name, value in dataclasses.asdict(options).items() if (name, value) != ("probe", None)}
    return result if result["settings"].items() >= {**wanted, "format": FORMAT}.items() else None
