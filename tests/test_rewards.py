"""Rewards: the sum, the registry, the check, and the testbed's three."""

import sys
from pathlib import Path

import pytest
import torch

from fastnabla.rewards import RewardSum, build_reward, check_reward, parse_term
from fastnabla.rewards.testbed import PREFERRED_HUE, area, foreground, hue
from fastnabla.testbed.silhouettes import hsv_to_rgb, load_masks, tint

CPU = torch.device("cpu")


def disc(radius: float, animal: torch.Tensor, ground: float) -> torch.Tensor:
    """A centred disc `[1, 3, 32, 32]` of colour `animal [3]` on a grey ground."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    inside = ((x - 15.5) ** 2 + (y - 15.5) ** 2 < radius**2).float()
    return (inside * animal[:, None, None] + (1 - inside) * ground)[None]


def test_sum_is_weighted() -> None:
    reward = RewardSum({"a": (lambda i, p: i.mean((1, 2, 3)), 2.0), "b": (lambda i, p: i.sum((1, 2, 3)), -0.5)})
    images = torch.rand(3, 3, 4, 4)
    torch.testing.assert_close(reward(images, [""] * 3), 2 * images.mean((1, 2, 3)) - 0.5 * images.sum((1, 2, 3)))


@pytest.mark.parametrize(
    ("term", "parsed"), [("area", ("area", 1.0)), ("area=8", ("area", 8.0)), ("m:f=-1", ("m:f", -1.0))]
)
def test_terms_parse(term: str, parsed: tuple[str, float]) -> None:
    assert parse_term(term) == parsed


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "empty"),
        (["beauty"], "unknown reward 'beauty'. Known: area"),
        (["area=x"], "'area=x' has weight 'x'"),
        (["area=nan"], "weight"),
        (["area=0"], "weight"),
        (["area", "area=2"], "appears twice"),
        (["no.such.module:reward"], "cannot import"),
        (["math:nothing"], "cannot import"),
        (["math:pi"], "not callable"),
    ],
)
def test_bad_terms_are_refused(terms: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_reward(terms)


def test_plug_in_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward_module.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(
        build_reward(["my_reward_module:red=3"])(images, ["", ""]), 3 * images[:, 0].mean((1, 2))
    )
    sys.modules.pop("my_reward_module")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda i, p: i.mean(), r"shape \(\)"),
        (lambda i, p: i.mean((2, 3)), r"shape \(2, 3\)"),
        (lambda i, p: [0.0, 0.0], "returned list"),
        (lambda i, p: i.mean((1, 2, 3)) / 0, "must be finite"),
        (lambda i, p: i.detach().mean((1, 2, 3)), "no gradient"),
        (lambda i, p: torch.zeros(2, requires_grad=True), "no gradient"),
        (lambda i, p: (i * 0).sum((1, 2, 3)).sqrt(), "non-finite gradient"),
    ],
    ids=["scalar", "per-channel", "list", "infinite", "detached", "unconnected", "nan-gradient"],
)
def test_check_finds_broken_rewards(function, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_reward(RewardSum({"mine": (function, 1.0)}), ["a cat"], (32, 32))
    assert "'mine'" in str(error.value)


def test_testbed_rewards_pass_the_check() -> None:
    check_reward(build_reward(["area", "classifier", "hue"]), ["a cat", "an elephant"], (32, 32))


def test_area_counts_pixels_whatever_the_hue_and_ground() -> None:
    for shade in (0.05, 0.95):
        hues = torch.arange(12) / 12
        colours = hsv_to_rgb(hues, torch.full((12,), 0.9), torch.full((12,), 0.9))
        images = torch.cat([disc(8, colour, shade) for colour in colours])
        values = area(CPU)(images, [""] * 12)
        share = (foreground(disc(8, torch.zeros(3) + (shade < 0.5), shade)) > 0.5).float().mean()
        # 1 − e⁻⁴ of every pixel of the animal counts.
        torch.testing.assert_close(values, share.expand(12), atol=0, rtol=0.03)
        torch.testing.assert_close(values, values[:1].expand(12), atol=0, rtol=0.005)
    small, large = (area(CPU)(disc(r, torch.tensor([1.0, 0, 0]), 0.0), [""]) for r in (5, 10))
    assert large > 3 * small


def test_area_gains_nothing_from_contrast() -> None:
    generator = torch.Generator().manual_seed(0)
    contrast = torch.tensor(0.8, requires_grad=True)
    size = torch.tensor(8.0, requires_grad=True)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    shape = torch.sigmoid(2 * (size - ((x - 15.5) ** 2 + (y - 15.5) ** 2).sqrt()))
    texture = 0.9 + 0.1 * torch.rand(1, 3, 32, 32, generator=generator)
    value = area(CPU)(0.1 + contrast * shape * texture, [""])
    by_contrast, by_size = torch.autograd.grad(value.sum(), (contrast, size))
    # A tenth more contrast is worth less than a hundredth of a tenth more radius.
    assert (by_contrast * 0.08).abs() < 0.01 * by_size * 0.8


def test_hue_prefers_its_colour() -> None:
    hues = torch.tensor([PREFERRED_HUE, PREFERRED_HUE + 0.5, PREFERRED_HUE + 0.25])
    colours = hsv_to_rgb(hues % 1, torch.ones(3), torch.ones(3))
    values = hue(CPU)(torch.cat([disc(10, colour, 0.0) for colour in colours]), [""] * 3)
    assert values[0] > 0.95 and values[1] < -0.95 and values[2].abs() < 0.2


def test_classifiers_know_the_test_split() -> None:
    from fastnabla.testbed.classifier import load_classifier

    masks, labels = load_masks("test")
    images = tint(masks, torch.Generator().manual_seed(0))
    for role in ("reward", "evaluation"):
        assert (load_classifier(role)(images).argmax(1) == labels).float().mean() > 0.9


def test_classifier_reward_wants_a_known_animal() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        build_reward(["classifier"])(torch.rand(1, 3, 32, 32), ["a toaster"])
