"""The network rewards against numbers of the original implementations, on tiny models with random weights."""

import json
import re

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from fastnabla.rewards.clip import VIT_H_14
from fastnabla.rewards.head import ScoreHead
from fastnabla.rewards.hpsv2 import from_open_clip
from fastnabla.rewards.imagereward import TEXT, VISION, _networks, from_image_reward
from fastnabla.rewards.options import RewardOptions
from fastnabla.rewards.preprocess import CLIP_STD, crop_short_side, squash
from fastnabla.rewards.text import clean_prompt
from tests.checks import relative_error
from tests.golden_rewards import GOLDEN, SETS, TINY, golden, gradient, has_full_set

REFERENCE = RewardOptions(preprocess="reference")
META = torch.device("meta")


def assert_values(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance`, relative to the largest value if that is above 1."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("dtype", "values", "gradients"),
    [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-12, 1e-11)],
    ids=["float32", "float64"],
)
def test_scores_and_gradients(name: str, dtype: torch.dtype, values: float, gradients: float) -> None:
    """Against the original's float64 numbers. The repository's sets keep gradients in float32; `aesthetic` is derived from a
    float32 embedding."""
    numbers, reward = golden(name), TINY[name]().to(dtype)
    expected, expected_grad = numbers.expected["rewards_f64"], numbers.expected["image_grad_f64"]
    if not has_full_set(name):
        values, gradients = max(values, 1e-7), max(gradients, 2e-6)
    elif expected_grad.dtype == torch.float32:
        gradients = max(gradients, torch.finfo(torch.float32).eps)
    pixels = numbers.inputs["pixel_values"].to(dtype).requires_grad_()
    score = reward.score(pixels, numbers.prompts)
    (image_grad,) = torch.autograd.grad(score.sum(), pixels)
    assert_values(score.detach().double(), expected, values)
    assert relative_error(image_grad, expected_grad) < gradients


def test_the_head_is_the_product_of_its_layers() -> None:
    """No activations between the layers, in this order; the repository's sets have the product alone."""
    head = ScoreHead(8).double()
    features = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = features
    for layer in (0, 2, 4, 6, 7):
        expected = expected @ head.state_dict()[f"layers.{layer}.weight"].T + head.state_dict()[f"layers.{layer}.bias"]
    torch.testing.assert_close(head(features), expected[:, 0], rtol=1e-12, atol=1e-12)


def test_clipscore_is_the_cosine() -> None:
    numbers = golden("pickscore")
    score = TINY["clipscore"]().score(numbers.inputs["pixel_values"], numbers.prompts)
    assert_values(score.double(), numbers.expected["cosine"].double())


def case(name: str, which: str) -> tuple[Tensor, list[str]]:
    """Images `[1, 3, H, W]` in [0, 1] of a preprocessing case, and their prompt."""
    numbers = golden(name)
    with_own_text = f"{which}.input_ids" in numbers.preprocess
    return numbers.preprocess[f"{which}.images_u8"] / 255, [which if with_own_text else "0"]


def cases() -> list[tuple[str, str, RewardOptions]]:
    """The preprocessing cases of the sets. Those of `aesthetic` are squashed, and need the weights of its own set."""
    found = []
    for name, settings in (
        ("aesthetic", [REFERENCE]),
        ("hpsv2", [RewardOptions(), REFERENCE]),
        ("imagereward", [RewardOptions(), REFERENCE]),
    ):
        which = {key.partition(".")[0] for key in golden(name).preprocess}
        found += [(name, case, options) for case in sorted(which) for options in settings]
    return found


@pytest.mark.parametrize(("name", "which", "options"), cases())
def test_images_to_rewards(name: str, which: str, options: RewardOptions) -> None:
    if not has_full_set(name):
        pytest.skip(f"no weights of rewards/{name} in {GOLDEN.parent}; FASTNABLA_GOLDEN names a folder that has them")
    numbers, reward = golden(name).preprocess, TINY[name](options)
    images, prompts = case(name, which)
    assert_values(reward.preprocess(images), numbers[f"{which}.pixel_values"])
    values, image_grad = gradient(reward, images, prompts)
    assert_values(values, numbers[f"{which}.rewards"])
    if f"{which}.images_grad" in numbers:
        assert relative_error(image_grad, numbers[f"{which}.images_grad"]) < 1e-4


AESTHETIC_CASES = sorted({key.partition(".")[0] for key in golden("aesthetic").preprocess})


@pytest.mark.parametrize("which", AESTHETIC_CASES)
def test_aesthetic_pixels(which: str) -> None:
    """The reference squashes without antialias; the official pixels are close to PIL's."""
    numbers = golden("aesthetic").preprocess
    images, _ = case("aesthetic", which)
    size = numbers[f"{which}.pixel_values"].shape[-1]
    official, reference = crop_short_side(images, size), squash(images, size)
    assert_values(reference, numbers[f"{which}.pixel_values"])
    unit = torch.tensor(CLIP_STD)[:, None, None]  # back to differences of images in [0, 1]
    pil = numbers[f"{which}.pixel_values_pil"]
    distances = {
        name: ((pixels - pil) * unit).abs() for name, pixels in (("official", official), ("reference", reference))
    }
    assert distances["official"].mean() < 0.003 and distances["official"].max() < 0.1
    assert distances["reference"].mean() > 0.02
    for options, resize in ((RewardOptions(), crop_short_side), (REFERENCE, squash)):
        own = TINY["aesthetic"](options)
        assert torch.equal(own.preprocess(images), resize(images, own.clip.config.image_size))


@pytest.mark.parametrize("prompt", json.loads((GOLDEN / "hpsv2" / "token_ids.json").read_text())["prompts"])
def test_prompts_are_cleaned_as_open_clip_does(prompt: dict[str, str]) -> None:
    cleaned = " ".join(clean_prompt(prompt["text"]).split()).lower()  # the rest is in CLIP's tokenizer
    assert cleaned == prompt["cleaned"]


def by_mapping(mapping: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` renamed by a golden key_mapping.json, as the README of `tests/golden` says."""
    renamed = {}
    for name, tensor in state.items():
        if any(re.search(pattern, name) for pattern in mapping["ignore"]):
            continue
        parts = {name: tensor.T if any(re.search(pattern, name) for pattern in mapping["transpose"]) else tensor}
        if any(re.search(pattern, name) for pattern in mapping["split_qkv"]):
            ((suffix, suffixes),) = [item for item in mapping["split_suffixes"].items() if name.endswith(item[0])]
            parts = dict(zip((name.removesuffix(suffix) + s for s in suffixes), tensor.chunk(3), strict=True))
        for part, value in parts.items():
            for pattern, replacement in mapping["rename"]:
                part = re.sub(pattern, replacement, part)
            renamed[part] = value
    return renamed


def test_open_clip_names_are_mapped_as_given() -> None:
    mapping = json.loads((GOLDEN / "hpsv2" / "key_mapping.json").read_text())
    state = golden("hpsv2").state
    ours, given = from_open_clip(state), by_mapping(mapping, state)
    assert ours.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(ours[name], tensor), name


def at_real_depth(state: dict[str, Tensor], pattern: str, depth: int) -> dict[str, Tensor]:
    """`state` with the names of layer 0, which match `pattern`, repeated for `depth` layers."""
    grown = {}
    for name, tensor in state.items():
        if found := re.match(pattern, name):
            if found[2] == "0":
                grown |= {f"{found[1]}{layer}{found[3]}": tensor for layer in range(depth)}
        else:
            grown[name] = tensor
    return grown


def test_names_are_complete_at_the_real_sizes() -> None:
    state = at_real_depth(golden("hpsv2").state, r"(visual\.transformer\.resblocks\.)(\d+)(.*)", 32)
    state = at_real_depth(state, r"(transformer\.resblocks\.)(\d+)(.*)", 24)
    assert len(state) == 686
    with META:
        clip = CLIPModel(VIT_H_14)
    assert from_open_clip(state).keys() == clip.state_dict().keys() and len(clip.state_dict()) == 910

    state = at_real_depth(golden("imagereward").state, r"(blip\.visual_encoder\.blocks\.)(\d+)(.*)", 24)
    state = at_real_depth(state, r"(blip\.text_encoder\.encoder\.layer\.)(\d+)(.*)", 12)
    networks = torch.nn.ModuleDict(_networks(META, VISION, TEXT))
    ours = from_image_reward(
        {name: tensor for name, tensor in state.items() if not re.search("_proj|position_ids", name)}
    )
    assert ours.keys() == networks.state_dict().keys() and len(ours) == 620
