"""LAION's aesthetic predictor: OpenAI's CLIP and a linear head rate an image from 1 to 10."""

import functools
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from fastnabla.objective.gaussian import full
from fastnabla.rewards.clip import POSITION_IDS, VIT_L_14
from fastnabla.rewards.head import ScoreHead
from fastnabla.rewards.options import DEFAULTS, RewardOptions
from fastnabla.rewards.preprocess import crop_short_side, squash
from fastnabla.rewards.published import PublishedReward, made_on
from fastnabla.rewards.weights import Source, load_weights, read_state_dict


class Aesthetic(PublishedReward):
    """The predicted rating; the prompt is ignored.

    Args:
        clip: image tower and projection.
        head: takes normalised image embeddings.
        options: settings.
    """

    name = "aesthetic"
    sources: ClassVar[dict[str, Source]] = {
        "": Source("openai/clip-vit-large-patch14", ("model.safetensors",)),
        "head": Source("trl-lib/ddpo-aesthetic-predictor", ("aesthetic-model.pth",)),
    }
    image_networks = ("clip",)
    clip: CLIPVisionModelWithProjection
    head: ScoreHead

    def __init__(self, clip: CLIPVisionModelWithProjection, head: ScoreHead, options: RewardOptions = DEFAULTS) -> None:
        resize = {"official": crop_short_side, "reference": squash}[options.preprocess]
        super().__init__(functools.partial(resize, size=clip.config.image_size), options, clip=clip, head=head)

    def score(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """Ratings `[B]`."""
        return self.head(F.normalize(full(self.clip(pixel_values).image_embeds), dim=-1))

    @classmethod
    def from_weights(
        cls, device: torch.device, options: RewardOptions = DEFAULTS, config: CLIPVisionConfig | None = None
    ) -> Self:
        """Load the published weights.

        Args:
            device: device of the networks.
            options: settings; `weights` may name copies of CLIP's weights and of ``head``.
            config: architecture of the image tower; None for CLIP ViT-L/14.

        Raises:
            ValueError: weights are missing or damaged, or do not fit the network.
        """
        (clip_path,), (head_path,) = cls.find(cls.name, options), cls.find("aesthetic.head", options)
        networks = _networks(device, config or VIT_L_14.vision_config)
        text_tower = (r"^text_model\.", r"^text_projection\.", r"^logit_scale$", POSITION_IDS)
        load_weights(cls.name, networks["clip"], read_state_dict(cls.name, clip_path), ignore=text_tower)
        load_weights("aesthetic.head", networks["head"], read_state_dict("aesthetic.head", head_path))
        return cls(**networks, options=options)

    @classmethod
    def random_init(cls, device: torch.device, options: RewardOptions = DEFAULTS) -> Self:
        """Build the published architecture with random weights."""
        return cls(**_networks(device, VIT_L_14.vision_config), options=options)


def _networks(device: torch.device, config: CLIPVisionConfig) -> dict[str, torch.nn.Module]:
    return made_on(
        device, lambda: {"clip": CLIPVisionModelWithProjection(config), "head": ScoreHead(config.projection_dim)}
    )
