"""The output of a comparison: comparison.json, .md, .html and the plots. Each file is written atomically."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastnabla.comparison.document import document
from fastnabla.comparison.figures import fronts, reward_curves
from fastnabla.comparison.plan import Plan, PlannedRun
from fastnabla.comparison.points import Point, read_points
from fastnabla.comparison.sheet import Sheet
from fastnabla.comparison.summary import common_rewards, matched
from fastnabla.comparison.tables import final_sheet, matched_sheet, target_sheets
from fastnabla.cost.budget import update_passes
from fastnabla.utils.durable import write_file

NAME = "comparison"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The results of a comparison, which may be incomplete."""

    plan: Plan
    points: Sequence[Point]
    """Points of all runs that have ended."""
    remarks: Sequence[str]
    """Remarks on runs that are missing, ended early or have lost some durations."""
    evaluations: Mapping[str, Sequence[dict[str, Any]]]
    """Variant → results of `fastnabla.evaluate`, one per seed; empty if they were not requested."""

    @classmethod
    def read(
        cls, plan: Plan, ended: Sequence[PlannedRun], evaluations: Mapping[str, Sequence[dict[str, Any]]]
    ) -> "Report":
        """Read the folders of the runs that have `ended`.

        Raises:
            ValueError: a run's metrics cannot be read.
        """
        points, remarks = [], []
        for run in plan.runs:
            own = read_points(run) if run in ended else []
            last = own[-1].update if own else 0
            if last > 0:
                points += own
            if run not in ended:
                remarks.append(f"{run.folder.name} has not ended.")
            elif not run.done:
                why = run.passed_bound() or f"its last evaluation is after {last} updates"
                remarks.append(f"{run.folder.name} ended early; {why}.")
            if own and own[-1].untimed:
                missing = f"its timing.jsonl lacks {own[-1].untimed} of its updates"
                remarks.append(f"{run.folder.name}: {missing}, so its seconds may be too few.")
        return cls(plan=plan, points=points, remarks=remarks, evaluations=evaluations)

    def sheets(self) -> list[Sheet]:
        """All tables."""
        points, samples = self.points, self.plan.samples
        return [final_sheet(points, samples), matched_sheet(points, samples), *target_sheets(self.evaluations)]

    def write(self, folder: Path) -> None:
        """Write all files into `folder`. Nothing is written before a run has been evaluated after an update."""
        if not self.points:
            return
        plots = {"reward": reward_curves(self.points), "fronts": fronts(self.points)}
        plots = {name: png for name, png in plots.items() if png is not None}
        for name, png in plots.items():
            write_file(folder / f"{NAME}-{name}.png", png)
        write_file(folder / f"{NAME}.json", json.dumps(self.values(), allow_nan=False) + "\n")
        write_file(
            folder / f"{NAME}.md",
            "\n".join([*(f"{remark}\n" for remark in self.remarks), *(sheet.markdown() for sheet in self.sheets())]),
        )
        write_file(folder / f"{NAME}.html", document(self.plan, self.points, self.remarks, self.evaluations, plots))

    def values(self) -> dict[str, Any]:
        """The results as JSON data. Numbers that are not finite are None."""
        runs = [
            {
                "variant": run.variant,
                "seed": run.config.seed,
                "folder": run.folder.name,
                "updates": run.config.updates,
                "planned_passes": update_passes(run.config) * run.config.updates,
            }
            for run in self.plan.runs
        ]
        return _finite(
            {
                "preset": self.plan.preset,
                "passes": self.plan.passes,
                "settings": self.plan.settings,
                "runs": runs,
                "remarks": list(self.remarks),
                "points": [dataclasses.asdict(point) for point in self.points],
                "common_rewards": {str(seed): reward for seed, reward in common_rewards(self.points).items()},
                "matched": [{n: getattr(p, n) for n in ("variant", "seed", "update")} for p in matched(self.points)],
                "evaluations": dict(self.evaluations),
            }
        )


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON cannot represent, by None."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
