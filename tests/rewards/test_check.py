"""`python -m fastnabla.rewards`: what it finds, what it measures, and its exit status."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastnabla.rewards import PUBLISHED, RewardOptions, inspection
from fastnabla.rewards.__main__ import in_float32, main, sample_images
from fastnabla.rewards.in_float32 import InFloat32
from fastnabla.rewards.inspection import SavedBytes, deviation, gradient_error, inspect_reward
from tests.golden_rewards import TINY, gradient

IMAGES = sample_images(None, 3, 32)
PROMPTS = ["a", "b", "a"]

BROKEN = """
import torch
def partly(i, p): return (i[:, :, 1:] - i[:, :, :-1].detach()).square().sum((1, 2, 3))
def doubled(i, p): return i.square().mean((1, 2, 3)) + (i.mean((1, 2, 3)) - i.detach().mean((1, 2, 3)))
def mixing(i, p): return (i - i.mean(0)).square().sum((1, 2, 3))
def rounded(i, p): return (i * 255).round().mean((1, 2, 3))
def scalar(i, p): return i.mean()
def infinite(i, p): return i.mean((1, 2, 3)) / 0
def raising(i, p): return i.mean((1, 2, 3)) + {}[p[0]]
def fine(i, p): return i.square().mean((1, 2, 3)) * torch.tensor([float(len(x)) for x in p])
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_rewards.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("broken_rewards", None)


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("partly", "gradient"),
        ("doubled", "gradient"),
        ("mixing", "rows"),
        ("rounded", "gradient"),
        ("scalar", "shape"),
        ("infinite", "values"),
    ],
)
def test_broken_rewards_fail(name: str, finding: str, broken: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"broken_rewards:{name}", "--size=32", "--device=cpu"]) == 1
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if "failed" in line]
    assert len(failed) == 1 and finding in failed[0] and "not all passed" in printed


def test_a_reward_that_raises_could_not_be_tried(broken: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "broken_rewards:raising", "--size=32", "--device=cpu", "--prompts", "cat", "dog"]) == 2
    printed = capsys.readouterr().err
    assert "reward 'broken_rewards:raising' failed on images (2, 3, 32, 32) (KeyError: 'cat' in " in printed
    assert "broken_rewards.py, line 9)." in printed and "Traceback" not in printed


def test_a_sound_reward_passes(broken: None, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompts", "cat", "giraffe"]
    assert main(["check", "broken_rewards:fine", "area", "--size=32", "--batch=3", "--device=cpu", *prompts]) == 0
    printed = capsys.readouterr().out
    assert "used" in printed and "ignored" in printed and "all passed" in printed and "kept for the backward" in printed


HALF = """
import torch
torch.manual_seed(0)
first, second = torch.nn.Conv2d(3, 16, 4, 4).requires_grad_(False), torch.nn.Linear(16, 1).requires_grad_(False)
stored = torch.nn.Linear(16, 1).to(torch.bfloat16).requires_grad_(False)
def features(i): return first(i).tanh().mean((2, 3))
def autocast(i, p):
    with torch.autocast("cpu", torch.bfloat16): return second(features(i))[:, 0]
def weights(i, p): return stored(features(i).to(torch.bfloat16))[:, 0].float()
def cut(i, p):
    with torch.autocast("cpu", torch.bfloat16): return second(features(i[:, :, 1:] - i[:, :, :-1].detach()))[:, 0]
"""


@pytest.mark.parametrize("name", ["autocast", "weights", "cut"])
def test_half_precision_is_named_if_it_is_why(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where float32 is right; not where a part of the gradient is missing too."""
    (tmp_path / f"half_{name}.py").write_text(HALF)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["check", f"half_{name}:{name}", "--size=32", "--device=cpu"]) == 1
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "failed" in printed
    assert ("so bfloat16 is why; use reward.precision float32" in printed) == (name != "cut")


def test_operations_in_float32_replace_half_precision() -> None:
    layer, x = torch.nn.Linear(8, 8).bfloat16(), torch.rand(2, 8, requires_grad=True)
    with InFloat32() as mode:
        y = layer(x.bfloat16()).sum()
        (gradient,) = torch.autograd.grad(y, x)
    expected = layer.weight.float().sum(0).expand(2, 8)
    assert y.dtype == gradient.dtype == torch.float32 and mode.replaced == {torch.bfloat16}
    torch.testing.assert_close(gradient, expected)
    with InFloat32() as mode:
        (x * 2).sum()
    assert not mode.replaced


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "beauty"], "unknown reward 'beauty'"),
        (["check", "area", "--images", "missing"], "images = 'missing': has 0 images, --batch needs 2"),
        (["check", "area", "--weights", "hpsv2"], "'hpsv2' is not of the form name=source"),
        (["check", "classifier", "--prompts", "a toaster", "a car"], "exactly one"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--size=32"] if arguments[0] == "check" else arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["check"], "spec"),
        (["check", "area", "--batch=1"], "batch"),
        (["check", "area", "--prompts", "a", "a"], "prompts"),
    ],
)
def test_bad_fields_are_named(arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and field in capsys.readouterr().err


def test_list_names_all_and_their_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in PUBLISHED) and "hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in printed


def test_images_come_from_the_folder_in_order(tmp_path: Path) -> None:
    for i, name in enumerate(("b.png", "a.jpg", "c.png", "notes.txt")):
        if name.endswith("txt"):
            (tmp_path / name).touch()
        else:
            Image.new("RGB", (40 + i, 30), (100 * i, 0, 0)).save(tmp_path / name)
    images = sample_images(tmp_path, 2, 16)
    assert images.shape == (2, 3, 16, 16)
    assert images[0, 0].mean() > 0.3 and images[1].max() == 0


def test_a_damaged_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 30)).save(tmp_path / "b.png")
    assert main(["check", "area", "--size=32", "--images", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert f"images: '{tmp_path / 'a.png'}' cannot be read (cannot identify" in printed and "remove it." in printed


def test_gradient_error_is_the_missing_share() -> None:
    def half(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        left, right = images.chunk(2, -1)
        return left.sum((1, 2, 3)) + right.detach().sum((1, 2, 3))

    error, rounding = gradient_error(half, IMAGES, PROMPTS)
    assert 0.1 < error < 3 and rounding < 0.02  # √½ of a random direction's typical slope
    assert gradient_error(lambda i, p: i.exp().sum((1, 2, 3)), IMAGES, PROMPTS)[0] < 0.01


def test_too_small_a_gradient_is_undecided() -> None:
    findings = inspect_reward(lambda i, p: 1e5 + i.mean((1, 2, 3)), IMAGES, PROMPTS)
    (gradient,) = [finding for finding in findings if finding.what == "gradient"]
    assert gradient.passed is None and "too small" in gradient.result


def test_saved_bytes_counts_each_storage_once_without_parameters() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.rand(4, 8, requires_grad=True)
    saved = SavedBytes(list(layer.parameters()))
    with saved.counting():
        y = layer(x)
        (y * y.exp()).sum()
    assert saved.total == 3 * 4 * 8 * 4  # x, y and its exponential


def test_deviation_from_float32_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward in lower precision: gradient and rows are tested in float32."""
    halved, exact = TINY["hpsv2"](RewardOptions(precision="bf16")), TINY["hpsv2"]()
    found = {finding.what: finding for finding in inspect_reward(halved, IMAGES, ["0", "1", "0"], exact)}
    plain = {finding.what: finding for finding in inspect_reward(exact, IMAGES, ["0", "1", "0"])}
    assert found["precision"].result.startswith("deviation from float32: values up to ") and "precision" not in plain
    assert [found[what] for what in ("gradient", "rows", "values")] == [
        plain[what] for what in ("gradient", "rows", "values")
    ]
    values, gradients = deviation(halved, exact, IMAGES, ["0", "1", "0"])
    assert 0 < values.abs().max() < 1e-2 and 1e-3 < gradients.min() <= gradients.max() < 5e-2

    monkeypatch.setattr(inspection, "GRADIENT_TOLERANCE", 1e-3)
    coarse = {finding.what: finding for finding in inspect_reward(halved, IMAGES, ["0", "1", "0"], exact)}
    assert coarse["precision"].result.endswith("bfloat16 is why; " + inspection.FLOAT32)
    assert "is why" not in found["precision"].result + coarse["gradient"].result

    cpu = torch.device("cpu")
    assert in_float32("module:own", exact, cpu, RewardOptions()) is None
    assert in_float32("module:own", lambda images, prompts: images, cpu, RewardOptions()) is None


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_reward_of_your_own_is_copied_in_float32(checkpoint: bool) -> None:
    """All of it: weights stored in bfloat16, encoded prompts, and the layers that checkpointing calls."""
    prompts = ["0", "1", "0"]
    own = TINY["hpsv2"](RewardOptions(precision="bf16", checkpoint=checkpoint))
    values = own(IMAGES, prompts)
    copied = in_float32("module:own", own, torch.device("cpu"), RewardOptions())
    for parameter in own.parameters():
        parameter.data.fill_(torch.nan)
    assert (copied.precision, own.precision) == ("float32", "bf16")
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.float32}
    exact, gradients = gradient(copied, IMAGES, prompts)
    torch.testing.assert_close(exact, values, rtol=0.05, atol=0.01)
    assert torch.isfinite(gradients).all()
