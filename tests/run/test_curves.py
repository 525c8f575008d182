"""The curves of a run can be read: no empty panel, and labels on every axis."""

import math

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastnabla.run.curves import CURVES, curves

BALANCE = ("loss_forward", "loss_reverse", "loss_terminal", "loss_trust_region", "grad_norm_lora", "grad_norm_flow")
SCORES = ("norm_ref", "norm_residual", "norm_reward", "norm_target")
METRICS = {
    "balance": (*BALANCE, *SCORES),
    "adjoint": ("loss_forward", "grad_norm_lora", *SCORES),
    "direct": ("loss_reward", "norm_reward", "grad_norm_lora"),
    "ddpo": ("loss_surrogate", "grad_norm_lora"),
    "dag-kl": ("loss_balance", "loss_surrogate", "loss_trust_region", "grad_norm_lora", "grad_norm_flow"),
    "dag": ("loss_balance", "loss_trust_region", "grad_norm_lora", "grad_norm_flow"),
}
SEVERAL_AND_ONE = {"balance", "ddpo"}
"""Panels of several lines, and of one line."""
RANGES = {
    "under a decade": lambda update, place: 200.0 + 40 * place + 10 * math.sin(update),
    "a decade and a half": lambda update, place: 4.0 * (1 + place) * (1 + update / 4),
    "many decades": lambda update, place: 10.0 ** (place - update),
    "from zero": lambda update, place: float(place * (update - 1)),
    "of both signs": lambda update, place: 1e-4 * math.cos(update + place),
    "negative": lambda update, place: -1.5 - 0.1 * math.sin(update),
    "all equal": lambda update, place: 3.0,
    "all zero": lambda update, place: 0.0,
    "with gaps": lambda update, place: None if update % 2 else 50.0 * update,
}


def records(metrics, values, updates=5, probe=True):
    evaluation = {"reward_std": 0.5, "pairwise_distance": 0.3} | ({"prior_distance": 80.0} if probe else {})
    found = [{"phase": "evaluate", "update": u, "reward": 1.0 + u, **evaluation} for u in {0, updates}]
    for update in range(1, updates + 1):
        named = {name: values(update, place) for place, name in enumerate(metrics)}
        found.append({"phase": "train", "update": update, **named})
    return found


def shown_labels(axis: Axes, which: str) -> list[str]:
    """Labels of ticks within the panel."""
    one = getattr(axis, f"{which}axis")
    low, high = sorted(one.get_view_interval())
    return [label.get_text() for place, label in zip(one.get_ticklocs(), one.get_ticklabels(), strict=True)
            if low <= place <= high and label.get_text()]  # fmt: skip


def assert_readable(figure: Figure) -> None:
    """Every panel has a line with a value inside it, a legend, and at least two labels on each axis."""
    for axis in figure.axes:
        low, high = axis.get_ylim()
        for line in axis.lines:
            assert any(low <= value <= high for value in line.get_ydata()), axis.get_title()
        assert axis.lines and axis.get_legend() is not None, axis.get_title()
        for which in "xy":
            labels = shown_labels(axis, which)
            assert len(set(labels)) == len(labels) >= 2, f"{axis.get_title()}, {which}: {labels}"


CASES = [(method, name) for method in SEVERAL_AND_ONE for name in RANGES]
CASES += [(method, "many decades") for method in METRICS.keys() - SEVERAL_AND_ONE]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), sorted(CASES))
def test_panels_of_every_method_and_range(method, name):
    metrics = METRICS[method]
    figure = curves(records(metrics, RANGES[name]))
    assert_readable(figure)
    titles = [axis.get_title() for axis in figure.axes]
    own = [title for title, (phase, names, _) in CURVES.items() if phase == "train" and {*names} & {*metrics}]
    assert titles == ["reward", "diversity", "distance from the prior", *own]


@pytest.mark.parametrize("updates", [0, 1, 2, 40])
def test_short_and_long_runs(updates):
    figure = curves(records(METRICS["ddpo"], RANGES["under a decade"], updates, probe=False))
    assert_readable(figure)
    assert len(figure.axes) == (4 if updates else 2)
    for axis in figure.axes:
        for line in axis.lines:  # a line of one point is nothing without a marker
            assert len(line.get_xdata()) > 1 or line.get_marker() != "None"


@pytest.mark.slow
def test_a_wide_range_is_logarithmic_and_a_narrow_one_is_not():
    scales = {}
    for name, values in RANGES.items():
        figure = curves(records(("loss_reward",), values))
        scales[name] = next(axis for axis in figure.axes if axis.get_title() == "losses").get_yscale()
    assert {name for name, scale in scales.items() if scale == "symlog"} == {"many decades"}
    losses = next(
        axis for axis in curves(records(BALANCE, RANGES["many decades"])).axes if axis.get_title() == "losses"
    )
    assert losses.get_yscale() == "symlog" and losses.get_ylim()[0] == 0


def test_metrics_that_were_never_finite_have_no_line():
    figure = curves(records(("loss_forward", "norm_ref"), lambda update, place: 1.0 if place == 0 else None))
    assert "score norms" not in [axis.get_title() for axis in figure.axes]


def test_values_relative_to_a_pretrained_model_without_diversity():
    found = records(METRICS["ddpo"], RANGES["all equal"])
    figure = curves([record | {"pairwise_distance": 0.0} for record in found])
    assert "diversity" not in [axis.get_title() for axis in figure.axes]
