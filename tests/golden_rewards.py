"""Tiny reward models with the weights and numbers of the original implementations.

The repository has the sets `hpsv2` and `imagereward`. A CLIP is a CLIP: where the sets `pickscore` and `aesthetic` are
missing, they are derived from `hpsv2`'s numbers. `FASTNABLA_GOLDEN` names a folder that has all four in `rewards/`.
`tests/golden/README.md` describes the files.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel, CLIPVisionModelWithProjection
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from fastnabla.rewards.aesthetic import Aesthetic
from fastnabla.rewards.clip import ClipReward
from fastnabla.rewards.clipscore import ClipScore
from fastnabla.rewards.head import ScoreHead
from fastnabla.rewards.hpsv2 import HPSv2, from_open_clip
from fastnabla.rewards.imagereward import UNUSED, ImageReward, from_image_reward
from fastnabla.rewards.model import RewardModel
from fastnabla.rewards.options import DEFAULTS, RewardOptions
from fastnabla.rewards.pickscore import PickScore
from fastnabla.rewards.weights import load_weights

GOLDEN = Path(os.environ.get("FASTNABLA_GOLDEN") or Path(__file__).parent / "golden") / "rewards"


@dataclasses.dataclass(frozen=True, slots=True)
class GoldenReward:
    """The numbers of one set. Its prompts are row numbers; `tokenize` returns the token ids of a row."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    preprocess: dict[str, Tensor]

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of row `prompt` of the inputs, or of the preprocessing case of that name, without padding."""
        case = f"{prompt}.input_ids"
        ids = self.preprocess[case][0] if case in self.preprocess else self.inputs["input_ids"][int(prompt)]
        if "eot_token_id" in self.config:
            return ids[: ids.tolist().index(self.config["eot_token_id"]) + 1].tolist()
        return ids[ids != 0].tolist()

    @property
    def prompts(self) -> list[str]:
        return [str(row) for row in range(len(self.expected["rewards_f64"]))]


def has_full_set(name: str) -> bool:
    """Whether the set is there with its weights."""
    return (GOLDEN / name / "state_dict.safetensors").exists()


@functools.cache
def golden(name: str) -> GoldenReward:
    """A set of `GOLDEN`, or one derived from `hpsv2`."""
    folder, preprocess = GOLDEN / name, GOLDEN / name / "preprocess.safetensors"
    cases = load_file(preprocess) if preprocess.exists() else {}
    if not has_full_set(name):
        return dataclasses.replace(DERIVED[name](), preprocess=cases)
    parts = [load_file(folder / f"{part}.safetensors") for part in ("state_dict", "inputs", "expected")]
    numbers = GoldenReward(json.loads((folder / "config.json").read_text()), *parts, cases)
    if "mlp.product.weight" in numbers.state:
        product, bias = (numbers.state.pop(f"mlp.product.{kind}") for kind in ("weight", "bias"))
        numbers.state.update({f"mlp.{name}": value for name, value in head_of(product, bias).items()})
    return numbers


def head_of(product: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Weights of a `ScoreHead`, in float32, whose layers' product is `product [1, D]`, and whose bias is `bias [1]`, in float64.

    Each number is the sum of two float32 numbers, so the head agrees with float64 to 1e-14.
    """
    state = {name: torch.zeros_like(value) for name, value in ScoreHead(product.shape[1]).state_dict().items()}
    high, bias_high = product[0].float(), bias.float()
    state["layers.0.weight"][0], state["layers.0.weight"][1] = high, (product[0] - high).float()
    state["layers.2.weight"][0, :2] = 1
    for layer in (4, 6, 7):
        state[f"layers.{layer}.weight"][0, 0] = 1
    state["layers.6.bias"][0], state["layers.7.bias"][0] = (bias - bias_high).float()[0], bias_high[0]
    return state


def _derived_pickscore() -> GoldenReward:
    """Scores are those of `hpsv2`, the cosines, times CLIP's scale."""
    numbers = golden("hpsv2")
    scale = numbers.state["logit_scale"].double().exp()
    return GoldenReward(
        {"clip_config": clip_config(numbers.config).to_dict(), "eot_token_id": numbers.config["eot_token_id"]},
        {name: tensor.contiguous() for name, tensor in from_open_clip(numbers.state).items()},
        numbers.inputs,
        {"cosine": numbers.expected["rewards_f64"]}
        | {name: scale * numbers.expected[name] for name in ("rewards_f64", "image_grad_f64")},
        {},
    )


def _derived_aesthetic() -> GoldenReward:
    """With a text's embedding for the head, the score of an image is their cosine. `hpsv2` has that of its first row."""
    numbers = golden("hpsv2")
    head = head_of(numbers.expected["text_features"][:1].double(), torch.zeros(1, dtype=torch.float64))
    return GoldenReward(
        {"clip_config": clip_config(numbers.config).to_dict(), "mlp_dims": [numbers.config["embed_dim"]]},
        {f"clip.{name}": tensor.contiguous() for name, tensor in from_open_clip(numbers.state).items()}
        | {f"mlp.{name}": tensor for name, tensor in head.items()},
        {"pixel_values": numbers.inputs["pixel_values"][:1]},
        {name: numbers.expected[name][:1] for name in ("rewards_f64", "image_grad_f64")},
        {},
    )


DERIVED = {"aesthetic": _derived_aesthetic, "pickscore": _derived_pickscore}


def clip_config(config: dict[str, Any]) -> CLIPConfig:
    """transformers' of a tiny CLIP that is described in open_clip's words."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    common = {"hidden_act": config["hidden_act"], "projection_dim": config["embed_dim"]}
    return CLIPConfig(
        projection_dim=config["embed_dim"],
        vision_config=common
        | {
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        text_config=common
        | {
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": config["sot_token_id"],
            "eos_token_id": config["eot_token_id"],
        },
    )


def blip_configs(config: dict[str, Any]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    vision = BlipVisionConfig(image_size=config["image_size"], patch_size=config["patch_size"], **config["vision"])
    return vision, BlipTextConfig(**config["text"], bos_token_id=None, sep_token_id=None)


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def aesthetic(options: RewardOptions = DEFAULTS) -> Aesthetic:
    numbers = golden("aesthetic")
    clip = CLIPVisionModelWithProjection(CLIPConfig(**numbers.config["clip_config"]).vision_config)
    head = ScoreHead(numbers.config["mlp_dims"][0])
    load_weights("clip", clip, _under(numbers.state, "clip."), ignore=(r"^text_", r"^logit_scale$"))
    load_weights("head", head, _under(numbers.state, "mlp."))
    return Aesthetic(clip, head, options)


def hpsv2(options: RewardOptions = DEFAULTS) -> HPSv2:
    numbers = golden("hpsv2")
    clip = CLIPModel(clip_config(numbers.config))
    load_weights("hpsv2", clip, from_open_clip(numbers.state))
    return HPSv2(clip, numbers.tokenize, options)


def imagereward(options: RewardOptions = DEFAULTS) -> ImageReward:
    numbers = golden("imagereward")
    vision, text = blip_configs(numbers.config)
    networks = nn.ModuleDict(
        {
            "vision": BlipVisionModel(vision),
            "text": BlipTextModel(text, add_pooling_layer=False),
            "head": ScoreHead(text.hidden_size),
        }
    )
    load_weights("imagereward", networks, from_image_reward(numbers.state), UNUSED)
    return ImageReward(**networks, tokenize=numbers.tokenize, options=options)


def _clip(kind: type[ClipReward], options: RewardOptions) -> ClipReward:
    numbers = golden("pickscore")
    clip = CLIPModel(CLIPConfig(**numbers.config["clip_config"]))
    load_weights("pickscore", clip, numbers.state)
    return kind(clip, numbers.tokenize, options)


def pickscore(options: RewardOptions = DEFAULTS) -> ClipReward:
    return _clip(PickScore, options)


def clipscore(options: RewardOptions = DEFAULTS) -> ClipReward:
    """On the weights of the set pickscore, whose `cosine` it must give."""
    return _clip(ClipScore, options)


TINY = {
    "aesthetic": aesthetic,
    "hpsv2": hpsv2,
    "imagereward": imagereward,
    "pickscore": pickscore,
    "clipscore": clipscore,
}
"""Builders of the tiny rewards."""
SETS = ("aesthetic", "hpsv2", "imagereward", "pickscore")


def gradient(reward: RewardModel, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of their sum in the images."""
    images = images.detach().requires_grad_()
    values = reward(images, prompts)
    return values.detach(), torch.autograd.grad(values.sum(), images)[0]
