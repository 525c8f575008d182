"""Results of `fastnabla.evaluate` for the finished runs of a comparison."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fastnabla.comparison.plan import PlannedRun
from fastnabla.evaluation.options import FORMAT, EvaluationOptions, file_of
from fastnabla.evaluation.report import evaluate_run
from fastnabla.run.tracker import readable_records
from fastnabla.run.weights import update_of


def evaluate_all(
    runs: Sequence[PlannedRun], options: EvaluationOptions, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Results of the finished runs: variant → one per seed. Runs are measured unless they have results of the same weights with the
    same options.

    Raises:
        ValueError: a file of results is damaged, or a run's model, reward or probe cannot be built.
    """
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
    """The results stored in the run folder, if this version measured them with these options after the update that the weights are
    of now; otherwise None. Results of older versions, which do not say their update, are taken to be of this one.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / file_of(options)
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        settings = result["settings"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{str(path)!r} is damaged ({why}); remove it to measure the run again.") from error
    wanted = {name: value for name, value in dataclasses.asdict(options).items() if (name, value) != ("probe", None)}
    update = update_of(options.weights, readable_records(folder / "metrics.jsonl"))
    current = result.get("update", update) == update
    return result if current and settings >= {**wanted, "format": FORMAT}.items() else None
