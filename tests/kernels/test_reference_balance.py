"""The fused reverse residual whose target follows the reference, against plain torch in float64."""

import pytest

from fastnabla.objective.fused import FUSED
from tests.kernel_cases import DTYPES, LAST, Case, assert_matches, on_each_device
from tests.kernels.operations import AT_PREDICTION, NO_FLOW_NEXT, REFERENCE_BALANCE


@on_each_device
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("without", [(), AT_PREDICTION, NO_FLOW_NEXT], ids=str)
def test_values_and_gradients(device, without, dtypes):
    assert_matches(REFERENCE_BALANCE.evaluate, Case.of(without=without, **DTYPES[dtypes]).draw(device))


@on_each_device
@pytest.mark.parametrize(
    "options",
    [
        {"gamma": "constant"},
        {"gamma": "sqrt_alpha_bar"},
        {"gamma": "sqrt_alpha_bar", "without": AT_PREDICTION},
        {"weighting": "sigma"},
        {"weighting": "sigma", "without": (*AT_PREDICTION, *NO_FLOW_NEXT)},
        {"steps": (0, 5)},
        {"steps": (LAST, LAST), "without": NO_FLOW_NEXT},
        {"beta": 0.0},
        {"guidance_scale": None},
    ],
    ids=str,
)
def test_options(device, options):
    assert_matches(REFERENCE_BALANCE.evaluate, Case.of(**options).draw(device))


@on_each_device
@pytest.mark.parametrize("weighting", ["score", "sigma"])
def test_last_rows_do_not_see_the_next_flow(device, weighting):
    """Their residual is the same whatever g(x') is, and is not 0."""
    batch = Case.of(steps=(LAST, 0, LAST), weighting=weighting).draw(device)
    one, other = (
        REFERENCE_BALANCE.evaluate(FUSED, b)["loss"] for b in (batch, batch.replace(flow_next=batch["flow_next"] + 1))
    )
    assert (one == other).tolist() == [True, False, True]
    assert (one > 0).all()
