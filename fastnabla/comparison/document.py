"""What `comparison.html` says, from top to bottom."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastnabla.comparison import page
from fastnabla.comparison.budget import update_passes
from fastnabla.comparison.plan import Plan
from fastnabla.comparison.points import Point
from fastnabla.comparison.summary import matched
from fastnabla.comparison.tables import Sheet, final_sheet, matched_sheet, target_sheets
from fastnabla.prompts import RunPrompts


def document(
    plan: Plan,
    points: Sequence[Point],
    remarks: Sequence[str],
    evaluations: Mapping[str, Sequence[dict[str, Any]]],
    plots: Mapping[str, bytes],
) -> str:
    """The page of a comparison.

    Args:
        plan: its runs, in whose folders prompts and pictures are.
        points: of all that have ended.
        remarks: on the others.
        evaluations: variant → results of `fastnabla.evaluate`, one a seed; empty if there are none.
        plots: PNGs, "reward" and, if diversity was measured, "fronts".
    """
    parts = [*_setup(plan, points, remarks), page.heading("Reward by what it cost")]
    parts += [
        page.picture(plots["reward"], f"{CURVES} {COST}"),
        page.table(final_sheet(points)),
        page.paragraph(COLUMNS),
    ]
    if "fronts" in plots:
        parts += [page.heading("Reward against diversity and prior"), page.picture(plots["fronts"], FRONTS)]
    parts += [page.heading("At equal reward"), page.paragraph(MATCHED), page.table(matched_sheet(points))]
    parts += _grids(plan, points)
    if evaluations:
        parts += [page.heading("Against the tilted target"), page.paragraph(TARGET)]
        parts += [page.table(sheet) for sheet in target_sheets(evaluations)]
    return page.page(f"Methods compared: {plan.preset}", parts)


def _setup(plan: Plan, points: Sequence[Point], remarks: Sequence[str]) -> list[str]:
    """What was compared, at what budget."""
    begun = next(run for run in plan.runs if (run.variant, run.config.seed) == (points[0].variant, points[0].seed))
    config = begun.config
    prompts = RunPrompts.load(begun.folder / "prompts.json")
    seeds = len({point.seed for point in points})
    budget = (
        "the same number of updates of each method, whatever they spend"
        if plan.passes is None
        else f"{plan.passes:,.0f} network passes (U) a run, or as much of it as whole updates fill"
    )
    sampler = config.sampler
    facts = (
        f"Model: {config.model.name}; {sampler.steps} steps of {sampler.scheduler}, guidance {sampler.guidance_scale:g}",
        f"Reward: {' + '.join(config.reward.terms)}",
        f"Budget: {budget}; {'one seed' if seeds == 1 else f'{seeds} seeds, tables give mean [lowest, highest]'}",
        f"Other than in the preset: {', '.join(plan.common_settings) or 'nothing'}",
        f"Evaluated on {config.evaluation.samples} samples each of: "
        + ", ".join(prompts.texts[number] for number in prompts.evaluated),
    )
    return [page.listing([*facts, *remarks]), page.table(_budget(plan, points))]


def _budget(plan: Plan, points: Sequence[Point]) -> Sheet:
    rows = []
    for variant in plan.variants:
        config = plan.of(variant)[0].config
        spent = [p.passes for p in points if (p.variant, p.update) == (variant, config.updates)]
        rows.append(
            [
                variant,
                f"{config.updates:,}",
                f"{update_passes(config):,g}",
                ", ".join(f"{passes:,.0f}" for passes in spent),
                ", ".join(plan.own_settings(variant)),
            ]
        )
    return Sheet("Budget", ["method", "updates", "U an update, planned", "U a run, measured", "own settings"], rows)


def _grids(plan: Plan, points: Sequence[Point]) -> list[str]:
    """The samples of each variant's first seed at the common reward."""
    first = {run.variant: run for run in reversed(plan.runs)}
    parts = []
    for point in matched(points):
        run = first[point.variant]
        if point.seed == run.config.seed:
            png = (run.folder / "samples" / f"update-{point.update:04d}.png").read_bytes()
            place = f"{point.variant}, seed {point.seed}, after {point.update} updates and {point.passes:,.0f} U"
            parts.append(page.picture(png, f"{place}: reward {point.metrics['reward']:.4g}"))
    return parts


CURVES = (
    "Reward along training, less the pretrained model's on the same prompts and noise. Lines: means over seeds; shaded: "
    "from the lowest to the highest seed."
)
COST = "A pass, U, is one of the UNet over a transition's guided rows; rollouts count, evaluations do not."
COLUMNS = (
    "transitions: those trained on; of refl, draft and draft-lv, which sample within the step, trajectories. seconds: of "
    "rollouts and updates alone. prior_distance: its value for the pretrained model is the floor that the finite number "
    "of samples sets."
)
FRONTS = (
    "Evaluations along training, less the pretrained model's (star) on the same prompts and noise: means over seeds, bars "
    "from the lowest to the highest. Points with a black edge are those that no other beats in both; the dashed line joins "
    "them."
)
MATCHED = (
    "A method that has gained less has also lost less, so methods are also compared at one reward: for each seed the "
    "highest that every method reaches. Of each run the nearest evaluation is taken; how near it is, the column reward "
    "says. Where that reward is not above the pretrained model's, some method has learned nothing, and nothing follows."
)
TARGET = (
    "Distances to p_ref · exp(βr), estimated by re-weighting samples of the pretrained model, at the largest β up to the "
    "run's own that this can tell (docs/evaluation.md). Only the finetuned models at the end of training are measured."
)
