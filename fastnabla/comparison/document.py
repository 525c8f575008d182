"""The content of `comparison.html`, from top to bottom."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastnabla.comparison import page
from fastnabla.comparison.plan import Plan
from fastnabla.comparison.points import Point
from fastnabla.comparison.sheet import Sheet
from fastnabla.comparison.summary import matched
from fastnabla.comparison.tables import final_sheet, matched_sheet, target_sheets
from fastnabla.cost.budget import update_passes
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
        plan: the runs, whose folders contain prompts and sample grids.
        points: evaluations of the finished runs.
        remarks: remarks on runs.
        evaluations: variant → results of `fastnabla.evaluate`, one per seed; may be empty.
        plots: PNG files "reward" and, if diversity was measured, "fronts".
    """
    parts = [*_setup(plan, points, remarks), page.heading("Reward against cost")]
    parts += [
        page.picture(plots["reward"], f"{CURVES} {COST}"),
        page.table(final_sheet(points, plan.samples)),
        page.paragraph(COLUMNS),
    ]
    if "fronts" in plots:
        parts += [
            page.heading("Reward against diversity and distance from the prior"),
            page.picture(plots["fronts"], FRONTS),
        ]
    matched_table = page.table(matched_sheet(points, plan.samples))
    parts += [page.heading("At equal reward"), page.paragraph(MATCHED), matched_table]
    parts += _grids(plan, points)
    if evaluations:
        parts += [page.heading("Distance from the tilted target"), page.paragraph(TARGET)]
        parts += [page.table(sheet) for sheet in target_sheets(evaluations)]
    return page.page(f"Comparison of methods: {plan.preset}", parts)


def _setup(plan: Plan, points: Sequence[Point], remarks: Sequence[str]) -> list[str]:
    """The settings and the budget."""
    started = next(run for run in plan.runs if (run.variant, run.config.seed) == (points[0].variant, points[0].seed))
    config = started.config
    prompts = RunPrompts.load(started.folder / "prompts.json")
    seeds = len({point.seed for point in points})
    budget = (
        "the same number of updates for each method, whatever they cost"
        if plan.passes is None
        else f"{plan.passes:,.0f} network passes (U) per run, rounded down to whole updates"
    )
    sampler = config.sampler
    facts = (
        f"Model: {config.model.name}; {sampler.steps} steps of {sampler.scheduler}, guidance {sampler.guidance_scale:g}",
        f"Reward: {' + '.join(config.reward.terms)}",
        f"Budget: {budget}; {'one seed' if seeds == 1 else f'{seeds} seeds; tables give mean [lowest, highest]'}",
        f"Changes to the preset: {', '.join(plan.common_settings) or 'none'}",
        f"Evaluated on {config.evaluation.samples} samples for each of the prompts: "
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
    return Sheet(
        "Budget", ["method", "updates", "U per update (planned)", "U per run (measured)", "own settings"], rows
    )


def _grids(plan: Plan, points: Sequence[Point]) -> list[str]:
    """Samples of each variant's first seed at the common reward."""
    first = {run.variant: run for run in reversed(plan.runs)}
    parts = []
    for point in matched(points):
        run = first[point.variant]
        if point.seed == run.config.seed:
            png = (run.folder / "samples" / f"update-{point.update:04d}.png").read_bytes()
            label = f"{point.variant}, seed {point.seed}, after {point.update} updates and {point.passes:,.0f} U"
            parts.append(page.picture(png, f"{label}: reward {point.metrics['reward']:.4g}"))
    return parts


CURVES = (
    "Change of the mean reward during training, relative to the pretrained model on the same prompts and noise. Lines are "
    "means over seeds; shaded areas span the lowest to the highest seed."
)
COST = "1 U is a pass of the UNet over the guided rows of a transition. Rollouts count, evaluations do not."
COLUMNS = (
    "transitions: the number of transitions trained on, or of trajectories for adjoint, refl, draft and draft-lv, which "
    "sample within the step. seconds: rollouts and updates only. prior_distance: the pretrained model's value is the floor "
    "set by the finite number of samples. hue_entropy: its ceiling is the mean of as many samples with uniform hues."
)
FRONTS = (
    "Changes during training relative to the pretrained model (star) on the same prompts and noise. Points are means over "
    "seeds; bars span the lowest to the highest seed. Points with a black edge, joined by the dashed line, form the Pareto "
    "front: no other point is better in both."
)
MATCHED = (
    "A method that gains less reward also loses less diversity, so methods are also compared at equal reward. For each seed "
    "that is the highest reward that every method reaches. The evaluation nearest to it is taken from each run; the column "
    "reward shows how near it is. Evaluations whose reward is not finite do not count, and runs without any other are left out. "
    "If this reward is not above the pretrained model's, some method has learned nothing and the comparison is meaningless."
)
TARGET = (
    "Distances to p_ref · exp(βr), estimated by re-weighting samples of the pretrained model. β is the run's own "
    "(objective.beta / objective.prior_weight), or the largest that the samples can estimate (docs/evaluation.md). The "
    "finetuned models are measured at the end of training."
)
