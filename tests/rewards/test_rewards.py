"""Rewards: the sum, normalising and clipping, the registry, the check, and the testbed's three."""

import json
import subprocess
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


def two_terms(**settings) -> RewardSum:
    terms = {"mean": (lambda i, p: i.mean((1, 2, 3)), 2.0), "sum": (lambda i, p: i.sum((1, 2, 3)), -1.0)}
    return RewardSum(terms, **settings)


def test_normalising_starts_as_the_identity_and_changes_only_by_observing() -> None:
    raw, reward = two_terms(), two_terms(normalise=True)
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(reward(images, [""] * 5), raw(images, [""] * 5))
    batches = [torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(n)) for n in (3, 1, 7)]
    for batch in batches:
        reward.observe(reward.parts(batch, [""] * len(batch)))
    values = reward(images, [""] * 5)
    assert torch.equal(reward(images, [""] * 5), values)
    seen, expected = raw.parts(torch.cat(batches), [""] * 11), torch.zeros(5)
    for name, weight in (("mean", 2), ("sum", -1)):
        mean, std = seen[name].double().mean(), seen[name].double().std(correction=0)
        expected = expected + weight * (raw.parts(images, [""] * 5)[name] - mean) / std
    torch.testing.assert_close(values, expected.float(), rtol=1e-5, atol=1e-5)
    parts = reward.parts(images, [""] * 5)
    assert torch.equal(reward.total(parts), raw(images, [""] * 5))  # what is logged stays raw


def test_normalised_gradient_is_that_of_the_terms_over_their_spread() -> None:
    reward = two_terms(normalise=True)
    seen = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    reward.observe(reward.parts(seen, [""] * 9))
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(images, ["", ""]).sum(), images)
    expected = 2 / 48 / reward.moments["mean"].std - 1 / reward.moments["sum"].std
    torch.testing.assert_close(gradient, torch.full_like(gradient, expected))


def test_statistics_are_stable_far_from_zero_and_do_not_blow_up_constants() -> None:
    reward = RewardSum({"a": (lambda i, p: i, 1.0)}, normalise=True)
    values = 1e6 + torch.arange(6.0)
    for part in values.split(4):
        reward.observe({"a": part})
    assert reward.moments["a"].std == pytest.approx(values.double().std(correction=0).item(), rel=1e-12)
    constant = RewardSum({"a": (lambda i, p: i, 1.0)}, normalise=True)
    constant.observe({"a": torch.full((8,), 3.0)})
    assert constant(torch.tensor([3.5]), [""]) == 0.5


def test_clipping_cuts_the_gradient_outside() -> None:
    images = torch.tensor([-5.0, -0.5, 0.5, 5.0], requires_grad=True)
    for normalise, std in ((False, 1.0), (True, 2.0)):
        reward = RewardSum({"a": (lambda i, p: i, 1.0)}, normalise=normalise, clip=1.0)
        reward.observe({"a": torch.tensor([-2.0, 2.0])})
        values = reward(images, [""] * 4)
        assert values.tolist() == [-1, -0.5 / std, 0.5 / std, 1]
        assert torch.autograd.grad(values.sum(), images)[0].tolist() == [0, 1 / std, 1 / std, 0]
    for clip in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"reward.clip"):
            build_reward(["area"], clip=clip)


def test_statistics_are_saved_and_restored_exactly() -> None:
    first, second = two_terms(normalise=True), two_terms(normalise=True)
    images = torch.rand(4, 3, 4, 4)
    first.observe(first.parts(images, [""] * 4))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for reward in (first, second):
        reward.observe(reward.parts(images.flip(-1) ** 2, [""] * 4))
    assert first.state_dict() == second.state_dict()
    assert torch.equal(first(images, [""] * 4), second(images, [""] * 4))
    with pytest.raises(ValueError, match="do not fit"):
        build_reward(["area"]).load_state_dict(first.state_dict())
    with pytest.raises(FloatingPointError, match="'mean' is not finite"):
        first.observe({"mean": torch.tensor([float("nan")]), "sum": torch.zeros(1)})


@pytest.mark.slow
def test_importing_rewards_needs_no_transformers_and_no_trainer() -> None:
    code = "import sys, fastnabla.rewards; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fastnabla.rewards.sum" in modules
    assert not {"transformers", "diffusers", "peft", "fastnabla.training.trainer", "fastnabla.methods.nabla_db"} & set(
        modules
    )


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


def test_a_module_by_path_is_moved_to_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_network_module.py").write_text("import torch\nnetwork = torch.nn.Linear(1, 1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    ((network, _),) = build_reward(["my_network_module:network"], "meta").terms.values()
    assert network.weight.device.type == "meta"
    sys.modules.pop("my_network_module")


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


@pytest.mark.slow
def test_classifiers_know_the_test_split() -> None:
    from fastnabla.testbed.classifier import load_classifier

    masks, labels = load_masks("test")
    images = tint(masks, torch.Generator().manual_seed(0))
    for role in ("reward", "evaluation"):
        assert (load_classifier(role)(images).argmax(1) == labels).float().mean() > 0.9


def test_classifier_reward_wants_a_known_animal() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        build_reward(["classifier"])(torch.rand(1, 3, 32, 32), ["a toaster"])
