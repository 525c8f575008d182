"""CLIPScore (arXiv 2104.08718) as a plain cosine: how well image and prompt match according to OpenAI's CLIP."""

from typing import ClassVar

from fastnabla.rewards.clip import VIT_L_14, ClipReward
from fastnabla.rewards.weights import Source

REPOSITORY = "openai/clip-vit-large-patch14"


class ClipScore(ClipReward):
    """The cosine similarity, in [-1, 1].

    The paper defines 2.5 · max(cosine, 0) with CLIP ViT-B/32. Here the scale is left to the term's weight. Negative values
    are kept, because the maximum has no gradient there.
    """

    name = "clipscore"
    config = VIT_L_14
    sources: ClassVar[dict[str, Source]] = {
        "": Source(REPOSITORY, ("model.safetensors",)),
        "tokenizer": Source(REPOSITORY, ("vocab.json", "merges.txt")),
    }
