"""Diversity and prior distance against cases with known answers."""

import math
import sys
from pathlib import Path

import pytest
import torch

from fastnabla.metrics.diversity import hue_entropy, hue_entropy_ceiling, mean_hue, pairwise_distance
from fastnabla.metrics.joint_entropy import joint_entropy, joint_entropy_ceiling
from fastnabla.metrics.prior import frechet_distance
from fastnabla.metrics.probes import build_probe
from fastnabla.testbed.silhouettes import hsv_to_rgb


def plain(hues: torch.Tensor) -> torch.Tensor:
    """Images `[N, 3, 8, 8]` of one colour each."""
    return hsv_to_rgb(hues, torch.ones(len(hues)), torch.ones(len(hues)))[:, :, None, None].expand(-1, -1, 8, 8)


def test_mean_hue_recovers_hue() -> None:
    hues = torch.linspace(0, 0.99, 37)
    # Hexagonal hue and the angle of the chroma vector differ by at most 0.0032 turns.
    assert ((mean_hue(plain(hues)) - hues + 0.5) % 1 - 0.5).abs().max() < 0.0035


def test_hue_entropy_of_one_hue_is_zero_and_of_all_is_one() -> None:
    prompt = torch.zeros(24, dtype=torch.long)
    assert hue_entropy(torch.full((24,), 0.3), prompt) == 0
    assert hue_entropy((torch.arange(24) % 12 + 0.5) / 12, prompt) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [2, 12, 16, 100])
def test_the_ceiling_is_the_mean_hue_entropy_of_uniform_hues(samples: int) -> None:
    """Within four standard errors, over 4,000 prompts."""
    hues = torch.rand(4000, samples, generator=torch.Generator().manual_seed(0))
    own = torch.tensor([hue_entropy(each, torch.zeros(samples)) for each in hues])
    error = 4 * own.std().item() / len(own) ** 0.5
    assert hue_entropy_ceiling(samples) == pytest.approx(own.mean().item(), abs=error)


def test_the_ceiling_in_closed_form() -> None:
    assert hue_entropy_ceiling(1) == 0
    assert hue_entropy_ceiling(2) == pytest.approx(11 / 12 * math.log(2) / math.log(12))  # two bins, or one
    assert hue_entropy_ceiling(12) == pytest.approx(0.783, abs=5e-4)
    assert 0.999 < hue_entropy_ceiling(5000) < 1


def test_hue_entropy_is_within_prompts() -> None:
    hues = torch.tensor([0.1, 0.1, 0.6, 0.6])
    assert hue_entropy(hues, torch.tensor([0, 0, 1, 1])) == 0
    assert hue_entropy(hues, torch.tensor([0, 1, 0, 1])) == pytest.approx(math.log(2) / math.log(12))


def test_joint_entropy_sees_a_ground_that_follows_the_hue() -> None:
    """Both grounds of all 12 hues have all of the entropy; a ground that the hue decides adds nothing to the hue's."""
    hues, prompt = (torch.arange(24) % 12 + 0.5) / 12, torch.zeros(24, dtype=torch.long)
    assert joint_entropy(hues, torch.arange(24) < 12, prompt) == pytest.approx(1)
    assert joint_entropy(hues, hues < 0.5, prompt) == pytest.approx(math.log(12) / math.log(24))
    assert joint_entropy(hues[:1].expand(24), (hues < 0.5).double(), prompt) == pytest.approx(
        math.log(2) / math.log(24)
    )
    # Within prompts: two images in the same cell, and two in different ones.
    same = joint_entropy(torch.full((4,), 0.3), torch.tensor([1.0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
    assert same == pytest.approx(math.log(2) / math.log(24) / 2)


@pytest.mark.slow
def test_the_ceiling_of_joint_entropy() -> None:
    """It is the mean for uniform hues and grounds, within four standard errors over 2,000 prompts."""
    assert joint_entropy_ceiling(1) == 0
    assert joint_entropy_ceiling(2) == pytest.approx(23 / 24 * math.log(2) / math.log(24))  # two cells, or one
    hues, dark = torch.rand(2, 2000, 16, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(16)
    own = torch.tensor([joint_entropy(hue, ground < 0.5, zeros) for hue, ground in zip(hues, dark, strict=True)])
    assert joint_entropy_ceiling(16) == pytest.approx(own.mean().item(), abs=4 * own.std().item() / len(own) ** 0.5)


def test_pixels_are_means_of_fields() -> None:
    small = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(4, 2).repeat_interleave(6, 3)
    probe = build_probe("pixels", "cpu")
    torch.testing.assert_close(probe.features(large), small.flatten(1))
    assert probe.features(torch.rand(3, 3, 5, 13)).shape == (3, 192)


def test_pairwise_distance_leaves_single_samples_out() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0]])
    assert pairwise_distance(features, torch.tensor([0, 0, 1])) == pytest.approx(5)
    assert math.isnan(pairwise_distance(features, torch.tensor([0, 1, 2])))


def test_frechet_distance_matches_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T
    shift, scale = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 2.0, 3.0])
    expected = shift.square().sum() + (1 - scale).square().sum()
    # Commuting covariances: |Δm|² + Σ (1 − s)²; exact up to the eigenvalue solver.
    assert frechet_distance(z * scale + shift, z) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "must be 'testbed'.*path.to.module:function"),
        (".foo:bar", "must be 'testbed'"),
        ("math:", "must be 'testbed'"),
        ("no.module:probe", "cannot import 'no.module:probe'"),
        ("math:nothing", "cannot import"),
        ("math:pi", "'math:pi' is not callable; it must take no arguments"),
        ("math:sqrt", "fails.*TypeError.*mend it"),
    ],
)
def test_unknown_probes_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.probe.*{message}"):
        build_probe(name, "cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def probe(:\n", r"cannot import.*SyntaxError.*broken_probes\.py, line 1"),
        ("import math\nmath = missing\n", r"cannot import.*NameError.*'missing'.*broken_probes\.py, line 2"),
        ("def probe():\n    return 1 / 0\n", r"fails.*ZeroDivisionError.*broken_probes\.py, line 2"),
    ],
    ids=["syntax", "name", "call"],
)
def test_errors_of_a_probe_s_module_are_named(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_probes.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_probes", raising=False)
    with pytest.raises(ValueError, match=rf"evaluation\.probe.*{message}"):
        build_probe("broken_probes:probe", "cpu")
    sys.modules.pop("broken_probes", None)
