"""Probes for photographs: CLIP with tiny weights, and stubs of lpips and dreamsim."""

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastnabla.metrics.diversity import mean_distance
from fastnabla.metrics.evaluation import Evaluator
from fastnabla.metrics.perceptual import ClipProbe
from fastnabla.metrics.probes import build_probe
from fastnabla.rewards import RewardSum
from tests.checks import randn
from tests.golden_rewards import TINY

IMAGES = torch.rand(6, 3, 48, 64, generator=torch.Generator().manual_seed(0))
PROMPT = torch.tensor([0, 0, 0, 1, 1, 1])


class Lpips(nn.Module):
    """A stub with the interface of lpips.LPIPS: images in [-1, 1] to `[N, 1, 1, 1]`."""

    def __init__(self, net: str = "alex", verbose: bool = True, pnet_rand: bool = False) -> None:
        super().__init__()
        assert net == "alex"
        self.pnet_rand = pnet_rand
        self.net = nn.Module()
        self.net.slice1, self.net.slice2 = nn.Module(), nn.Module()
        self.net.slice1.add_module("0", nn.Linear(2, 3))
        self.net.slice2.add_module("3", nn.Linear(3, 2))

    def forward(self, a: Tensor, b: Tensor, normalize: bool = False) -> Tensor:
        if normalize:
            a, b = 2 * a - 1, 2 * b - 1
        return (a - b).square().mean((1, 2, 3), keepdim=True)


class DreamSim(nn.Module):
    """A stub of dreamsim's model: embeds images `[N, 3, 224, 224]` in [0, 1], without the first axis if N is 1."""

    def __init__(self, cache_dir: str) -> None:
        super().__init__()
        self.cache_dir = cache_dir

    def embed(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, 224, 224) and images.min() >= 0 and images.max() <= 1
        return images.unflatten(3, (7, 32)).mean((2, 4)).flatten(1).squeeze()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    dreamsim = types.ModuleType("dreamsim")
    dreamsim.dreamsim = lambda pretrained, device, cache_dir="./models": (DreamSim(cache_dir), None)
    lpips = types.ModuleType("lpips")
    lpips.LPIPS = Lpips
    monkeypatch.setitem(sys.modules, "dreamsim", dreamsim)
    monkeypatch.setitem(sys.modules, "lpips", lpips)


@pytest.mark.parametrize("name", ["lpips", "dreamsim"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"evaluation\.probe = '{name}'.*pip install {name}"):
        build_probe(name, "cpu")


def test_clip_probe_sees_what_the_reward_sees() -> None:
    """Features times the reward's prompt embeddings give the reward, up to the float32 rounding of a dot product."""
    reward = TINY["clipscore"]()
    features = ClipProbe(reward).features(IMAGES)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    prompts = ["0", "1", "2", "0", "1", "2"]
    text = torch.stack([reward.encode_prompt(prompt) for prompt in prompts])
    torch.testing.assert_close((features * text).sum(1), reward(IMAGES, prompts), rtol=1e-5, atol=1e-6)


def test_clip_without_weights_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(ValueError, match="hf download openai/clip-vit-large-patch14"):
        build_probe("clip", "cpu")


def test_clip_probe_takes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = TINY["clipscore"]()
    reward.clip.save_pretrained(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    probe = build_probe(f"clip:~/{tmp_path.name}", "cpu")
    assert torch.equal(probe.features(IMAGES), ClipProbe(reward).features(IMAGES))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(
        ValueError, match=rf"evaluation\.probe = 'clip:{tmp_path}': .*is not the configuration of a CLIP"
    ):
        build_probe(f"clip:{tmp_path}", "cpu")


def test_lpips_probe_takes_a_folder(packages: None, tmp_path: Path) -> None:
    """torchvision's names of AlexNet's layers become those of LPIPS; other layers of the file are not used."""
    shapes = {"features.0": (3, 2), "features.3": (2, 3), "classifier.1": (4, 4)}
    state = {f"{name}.weight": randn(*shape) for name, shape in shapes.items()}
    state |= {f"{name}.bias": randn(shape[0]) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "alexnet-owt-7be5be79.pth")
    network = build_probe(f"lpips:{tmp_path}", "cpu").network
    assert network.pnet_rand and not build_probe("lpips", "cpu").network.pnet_rand
    assert torch.equal(network.net.slice1.get_submodule("0").weight, state["features.0.weight"])
    assert torch.equal(network.net.slice2.get_submodule("3").bias, state["features.3.bias"])
    del state["features.3.bias"]
    torch.save(state, tmp_path / "alexnet-owt-7be5be79.pth")
    with pytest.raises(ValueError, match=r"1 missing: slice2\.3\.bias"):
        build_probe(f"lpips:{tmp_path}", "cpu")


def test_dreamsim_probe_takes_a_folder(packages: None, tmp_path: Path) -> None:
    assert build_probe(f"dreamsim:{tmp_path}", "cpu").network.cache_dir == str(tmp_path)
    assert build_probe("dreamsim", "cpu").network.cache_dir == "./models"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("clip", "config.json'; download them with: hf download openai/"), ("lpips", "alexnet-.*'; download https")],
)
def test_missing_weights_and_folders_are_named(packages: None, tmp_path: Path, name: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.probe = '{name}:{tmp_path}': there is no '{tmp_path}/{remedy}"):
        build_probe(f"{name}:{tmp_path}", "cpu")
    with pytest.raises(ValueError, match=rf"evaluation\.probe = '{name}:nowhere': there is no such folder"):
        build_probe(f"{name}:nowhere", "cpu")


def test_dreamsim_probe_embeds_one_and_many(packages: None) -> None:
    probe = build_probe("dreamsim", "cpu")
    features = probe.features(IMAGES)
    assert features.shape == (6, 21)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(probe.features(IMAGES[:1]), features[:1])


def test_lpips_probe_measures_pairs_within_prompts(packages: None) -> None:
    probe = build_probe("lpips", "cpu")
    others = IMAGES.flip(0)
    torch.testing.assert_close(probe.distance(IMAGES, others), 4 * (IMAGES - others).square().mean((1, 2, 3)))
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    expected = sum(4 * (IMAGES[i] - IMAGES[j]).square().mean().item() for i, j in pairs) / 6
    for chunk in (None, 1, 2):
        assert mean_distance(IMAGES, PROMPT, probe.distance, chunk) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["lpips", "dreamsim"])
def test_the_evaluator_takes_either_kind(packages: None, name: str) -> None:
    reward = RewardSum({"red": (lambda images, prompts: images[:, 0].mean((1, 2)), 2.0)})
    evaluator = Evaluator(lambda *_: None, None, reward, build_probe(name, "cpu"), ["0", "1"], 3, chunk=4)
    evaluator.set_prior(IMAGES.flip(0))
    metrics = evaluator.measure(IMAGES)
    assert metrics["reward"] == pytest.approx(2 * IMAGES[:, 0].mean().item())
    assert metrics["pairwise_distance"] > 0
    assert ("vendi" in metrics, "prior_distance" in metrics) == ((name == "dreamsim"),) * 2
