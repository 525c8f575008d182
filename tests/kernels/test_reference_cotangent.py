"""The fused cotangent of the reference policy against plain torch in float64."""

import pytest

from tests.kernel_cases import DTYPES, LAST, Case, assert_matches, on_each_device
from tests.kernels.operations import REFERENCE_COTANGENT


@on_each_device
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("guidance", [None, 5.0])
@pytest.mark.parametrize("without", REFERENCE_COTANGENT.without, ids=str)
def test_values(device, without, guidance, dtypes):
    case = Case.of(without=without, guidance_scale=guidance, **DTYPES[dtypes])
    assert_matches(REFERENCE_COTANGENT.evaluate, case.draw(device))


@on_each_device
@pytest.mark.parametrize(
    "options",
    [
        {"steps": (0, 5)},
        {"steps": (LAST, LAST)},
        {"gamma": "sqrt_alpha_bar"},
        {"gamma": "constant"},
        {"beta": 0.0},
    ],
    ids=str,
)
def test_options(device, options):
    assert_matches(REFERENCE_COTANGENT.evaluate, Case.of(**options).draw(device))
