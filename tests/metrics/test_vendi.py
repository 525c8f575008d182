"""The Vendi score of cases with known answers."""

import math

import pytest
import torch

from fastnabla.metrics.vendi import mean_vendi_score, vendi_score
from tests.checks import randn


def test_alike_is_one_and_orthogonal_is_n() -> None:
    # Eigenvalues that should be 0 come out as about 1e-17, and -x log x of them as 1e-15.
    assert vendi_score(torch.tensor([[1.0, 2.0, 3.0]]).repeat(7, 1)) == pytest.approx(1, abs=1e-9)
    assert vendi_score(torch.eye(7)) == pytest.approx(7, abs=1e-9)


@pytest.mark.parametrize("width", [3, 40])
def test_clusters_count_by_the_entropy_of_their_shares(width: int) -> None:
    """With more samples than features, and with fewer."""
    features = torch.eye(width)[[0] * 8 + [1] * 2]
    assert vendi_score(features) == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)), abs=1e-9)


def test_equals_the_definition() -> None:
    """exp(−tr ρ log ρ), where ρ is the cosine kernel over n, from its eigenvalues. The norms of features do not matter."""
    features = randn(9, 4, dtype=torch.float64)
    x = features / features.norm(dim=1, keepdim=True)
    rho = x @ x.T / 9
    values = torch.linalg.eigvalsh(rho)
    values = values[values > 1e-12]
    expected = torch.exp(-(values * values.log()).sum()).item()
    assert vendi_score(features) == pytest.approx(expected, rel=1e-9)
    assert vendi_score(features * torch.arange(1, 10)[:, None]) == pytest.approx(expected, rel=1e-9)


def test_is_averaged_over_prompts() -> None:
    features = torch.eye(4)[[0, 0, 1, 2]]
    assert mean_vendi_score(features, torch.tensor([0, 0, 1, 1])) == pytest.approx((1 + 2) / 2)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_features_without_a_direction_have_no_score(bad: float) -> None:
    features = torch.stack([torch.ones(3), torch.full((3,), bad)])
    assert math.isnan(vendi_score(features))
    assert math.isnan(mean_vendi_score(torch.cat([torch.eye(3), features]), torch.tensor([0, 0, 0, 1, 1])))
