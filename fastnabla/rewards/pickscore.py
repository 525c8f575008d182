"""PickScore (arXiv 2305.01569): CLIP ViT-H/14 finetuned on people's choices between two images for a prompt."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from fastnabla.rewards.clip import VIT_H_14, ClipReward
from fastnabla.rewards.weights import Source


class PickScore(ClipReward):
    """The cosine similarity times CLIP's learned scale."""

    name = "pickscore"
    config = VIT_H_14
    sources: ClassVar[dict[str, Source]] = {
        "": Source("yuvalkirstain/PickScore_v1", ("model.safetensors",)),
        "tokenizer": Source("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ("vocab.json", "merges.txt")),
    }

    def score(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scaled cosine similarities `[B]`."""
        return self.clip.logit_scale.exp() * super().score(pixel_values, prompts)
