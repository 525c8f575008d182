"""What a comparison writes: comparison.json, .md, .html, and the plots, each file whole or not at all."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastnabla.comparison.budget import update_passes
from fastnabla.comparison.document import document
from fastnabla.comparison.figures import fronts, reward_curves
from fastnabla.comparison.plan import Plan, PlannedRun
from fastnabla.comparison.points import Point, read_points
from fastnabla.comparison.summary import common_rewards, matched
from fastnabla.comparison.tables import Sheet, final_sheet, matched_sheet, target_sheets
from fastnabla.utils.durable import write_file

NAME = "comparison"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A comparison, finished or so far."""

    plan: Plan
    points: Sequence[Point]
    """Of all runs that have ended."""
    remarks: Sequence[str]
    """On runs that are missing or ended early."""
    evaluations: Mapping[str, Sequence[dict[str, Any]]]
    """Variant → results of `fastnabla.evaluate`, one a seed; empty if not asked for."""

    @classmethod
    def read(
        cls, plan: Plan, ended: Sequence[PlannedRun], evaluations: Mapping[str, Sequence[dict[str, Any]]]
    ) -> "Report":
        """From the folders of the runs that have `ended`.

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
            elif last < run.config.updates:
                remarks.append(f"{run.folder.name} ended early; its last evaluation is of {last} updates.")
        return cls(plan=plan, points=points, remarks=remarks, evaluations=evaluations)

    def sheets(self) -> list[Sheet]:
        """All tables."""
        return [final_sheet(self.points), matched_sheet(self.points), *target_sheets(self.evaluations)]

    def write(self, folder: Path) -> None:
        """Write everything into `folder`; nothing if no run was evaluated after its start."""
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
        """Everything as JSON has it; null for what is not finite."""
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
    """`value` with None for all numbers in it that are not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
