"""The network rewards against numbers of the original implementations, on tiny models with random weights."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel

from fastnabla.rewards.clip import VIT_H_14
from fastnabla.rewards.hpsv2 import from_open_clip
from fastnabla.rewards.imagereward import TEXT, VISION, _networks, from_image_reward
from fastnabla.rewards.options import RewardOptions
from fastnabla.rewards.preprocess import CLIP_STD
from fastnabla.rewards.text import clean_prompt
from tests.checks import relative_error
from tests.golden_rewards import GOLDEN, SETS, TINY, golden, gradient

REFERENCE = RewardOptions(preprocess="reference")
META = torch.device("meta")


def assert_values(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance`, relative to the largest value if that is above 1."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("dtype", "suffix", "values", "gradients"),
    [(torch.float32, "", 1e-5, 1e-4), (torch.float64, "_f64", 1e-12, 1e-11)],
    ids=["float32", "float64"],
)
def test_scores_and_gradients(name: str, dtype: torch.dtype, suffix: str, values: float, gradients: float) -> None:
    numbers, reward = golden(name), TINY[name]().to(dtype)
    pixels = numbers.inputs["pixel_values"].to(dtype).requires_grad_()
    score = reward.score(pixels, numbers.prompts)
    (image_grad,) = torch.autograd.grad(score.sum(), pixels)
    assert_values(score.detach(), numbers.expected[f"rewards{suffix}"], values)
    assert relative_error(image_grad, numbers.expected[f"image_grad{suffix}"]) < gradients


def test_clipscore_is_the_cosine() -> None:
    numbers = golden("pickscore")
    score = TINY["clipscore"]().score(numbers.inputs["pixel_values"], numbers.prompts)
    assert_values(score, numbers.expected["cosine"])


def case(name: str, which: str) -> tuple[Tensor, list[str]]:
    """Images `[1, 3, H, W]` in [0, 1] of a preprocessing case, and their prompt."""
    numbers = golden(name)
    with_own_text = f"{which}.input_ids" in numbers.preprocess
    return numbers.preprocess[f"{which}.images_u8"] / 255, [which if with_own_text else "0"]


CASES = [
    ("aesthetic", "square", REFERENCE),
    ("aesthetic", "wide", REFERENCE),
    *[("hpsv2", which, options) for which in ("square", "tall", "wide") for options in (RewardOptions(), REFERENCE)],
]


def imagereward_cases() -> list[tuple[str, str, RewardOptions]]:
    names = load_file(GOLDEN / "imagereward" / "preprocess.safetensors")
    cases = sorted({name.partition(".")[0] for name in names})
    return [("imagereward", which, options) for which in cases for options in (RewardOptions(), REFERENCE)]


@pytest.mark.parametrize(("name", "which", "options"), CASES + imagereward_cases())
def test_images_to_rewards(name: str, which: str, options: RewardOptions) -> None:
    numbers, reward = golden(name).preprocess, TINY[name](options)
    images, prompts = case(name, which)
    assert_values(reward.preprocess(images), numbers[f"{which}.pixel_values"])
    values, image_grad = gradient(reward, images, prompts)
    assert_values(values, numbers[f"{which}.rewards"])
    assert relative_error(image_grad, numbers[f"{which}.images_grad"]) < 1e-4


@pytest.mark.parametrize("which", ["square", "wide"])
def test_official_aesthetic_pixels_are_pils(which: str) -> None:
    pil = golden("aesthetic").preprocess[f"{which}.pixel_values_pil"]
    images, _ = case("aesthetic", which)
    unit = torch.tensor(CLIP_STD)[:, None, None]  # back to differences of images in [0, 1]
    official, reference = (
        ((TINY["aesthetic"](o).preprocess(images) - pil) * unit).abs() for o in (RewardOptions(), REFERENCE)
    )
    assert official.mean() < 0.003 and official.max() < 0.1
    assert reference.mean() > 0.02  # no antialias, squashed


@pytest.mark.parametrize("prompt", json.loads((GOLDEN / "hpsv2" / "token_ids.json").read_text())["prompts"])
def test_prompts_are_cleaned_as_open_clip_does(prompt: dict[str, str]) -> None:
    cleaned = " ".join(clean_prompt(prompt["text"]).split()).lower()  # the rest is in CLIP's tokenizer
    assert cleaned == prompt["cleaned"]


def by_mapping(mapping: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` renamed by a golden key_mapping.json, as its README says."""
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
