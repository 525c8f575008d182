"""The fused reverse residual against plain torch in float64."""

import pytest

from fastnabla.objective.fused import FUSED
from tests.kernel_cases import DTYPES, LAST, Case, assert_matches, on_each_device
from tests.kernels.operations import AT_PREDICTION, REVERSE_BALANCE, WHOLE_SCORES


@on_each_device
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [None, 5.0])
def test_values_and_gradients(device, guidance, prior_weight, dtypes):
    """Of products of the cotangents and pixel scores; whole scores are among the options."""
    case = Case.of(guidance_scale=guidance, prior_weight=prior_weight, without=AT_PREDICTION, **DTYPES[dtypes])
    assert_matches(REVERSE_BALANCE.evaluate, case.draw(device))


@on_each_device
@pytest.mark.parametrize(
    "options",
    [
        {"without": WHOLE_SCORES},
        {"without": WHOLE_SCORES, "prior_weight": 1.0, "weighting": "sigma"},
        {"without": (*WHOLE_SCORES, *AT_PREDICTION), "guidance_scale": None},
        {"without": (), "gamma": "constant"},
        {"without": AT_PREDICTION, "gamma": "constant"},
        {"without": AT_PREDICTION, "gamma": "sqrt_alpha_bar"},
        {"without": AT_PREDICTION, "weighting": "sigma"},
        {"without": AT_PREDICTION, "steps": (0, 5)},
        {"without": AT_PREDICTION, "beta": 0.0},
        {"without": AT_PREDICTION, "prior_weight": 0.0},
    ],
    ids=str,
)
def test_options(device, options):
    assert_matches(REVERSE_BALANCE.evaluate, Case.of(**options).draw(device))


@on_each_device
@pytest.mark.parametrize("weighting", ["score", "sigma"])
def test_last_rows_have_no_reverse_residual(device, weighting):
    results = REVERSE_BALANCE.evaluate(FUSED, Case.of(steps=(LAST, 0, LAST), weighting=weighting).draw(device))
    assert (results["loss"] > 0).tolist() == [False, True, False]
    assert results["gradient of flow"].flatten(1).any(1).tolist() == [False, True, False]
