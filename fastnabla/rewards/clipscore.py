"""CLIPScore (arXiv 2104.08718), as the plain cosine: how well OpenAI's CLIP finds that image and prompt go together."""

from typing import ClassVar

from fastnabla.rewards.clip import VIT_L_14, ClipReward
from fastnabla.rewards.weights import Source

REPOSITORY = "openai/clip-vit-large-patch14"


class ClipScore(ClipReward):
    """The cosine, in [-1, 1].

    The paper takes max(cosine, 0), times 2.5, of CLIP ViT-B/32. Here scale is the term's weight, and negative values,
    where the maximum has no gradient, are kept.
    """

    name = "clipscore"
    config = VIT_L_14
    sources: ClassVar[dict[str, Source]] = {
        "": Source(REPOSITORY, ("model.safetensors",)),
        "tokenizer": Source(REPOSITORY, ("vocab.json", "merges.txt")),
    }
