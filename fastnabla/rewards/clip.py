"""CLIP as a reward: the cosine similarity of image and prompt. The base of `hpsv2`, `pickscore` and `clipscore`."""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from fastnabla.objective.gaussian import full
from fastnabla.rewards.options import DEFAULTS, RewardOptions
from fastnabla.rewards.preprocess import crop_short_side
from fastnabla.rewards.published import PublishedReward, made_on
from fastnabla.rewards.text import Tokenize, clip_tokenizer, hash_tokenizer
from fastnabla.rewards.weights import load_weights, read_state_dict

VIT_L_14 = CLIPConfig(
    projection_dim=768,
    vision_config={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    text_config={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
)
"""OpenAI's CLIP, with its approximate GELU: 224 pixels, 77 positions, 49408 tokens."""
VIT_H_14 = CLIPConfig(
    projection_dim=1024,
    vision_config={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
    text_config={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
)
"""LAION's CLIP, with exact GELU: 224 pixels, 77 positions, 49408 tokens."""
POSITION_IDS = r"embeddings\.position_ids$"
"""A constant that older checkpoints contain."""


class ClipReward(PublishedReward):
    """The cosine similarity of CLIP's embeddings of image and prompt, in [-1, 1].

    Args:
        clip: image and text tower.
        tokenize: prompt → token ids without padding. The last one is the end token, whose id is the highest.
        options: settings.
    """

    config: ClassVar[CLIPConfig]
    """The published architecture."""
    resize: ClassVar[Callable[[Tensor, int], Tensor]] = staticmethod(crop_short_side)
    image_networks = ("clip.vision_model",)
    clip: CLIPModel

    def __init__(self, clip: CLIPModel, tokenize: Tokenize, options: RewardOptions = DEFAULTS) -> None:
        super().__init__(functools.partial(self.resize, size=clip.config.vision_config.image_size), options, clip=clip)
        self.tokenize = tokenize

    def encode_prompt(self, prompt: str) -> Tensor:
        """Normalised embedding `[D]` of `prompt`. Padding is not needed: attention is causal and the last token is
        pooled."""
        ids = torch.tensor([self.tokenize(prompt)], device=self.clip.logit_scale.device)
        return F.normalize(self.clip.get_text_features(ids).pooler_output, dim=-1)[0]

    def score(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine similarities `[B]`."""
        image = F.normalize(full(self.clip.get_image_features(pixel_values).pooler_output), dim=-1)
        return (image * torch.stack([self.prompt_cache(prompt) for prompt in prompts])).sum(-1)

    @classmethod
    def from_weights(
        cls, device: torch.device, options: RewardOptions = DEFAULTS, config: CLIPConfig | None = None
    ) -> Self:
        """Load the published weights.

        Args:
            device: device of the networks.
            options: settings; `weights` may name copies of the weights and of ``tokenizer``.
            config: architecture; None for the published one.

        Raises:
            ValueError: weights are missing or damaged, or do not fit the network; or the tokenizer does not fit the text
                tower.
        """
        config = config or cls.config
        (path,) = cls.find(cls.name, options)
        vocab, merges = cls.find(f"{cls.name}.tokenizer", options)
        text = config.text_config
        tokenize = clip_tokenizer(vocab, merges, text.vocab_size, text.max_position_embeddings)
        clip = made_on(device, lambda: {"clip": CLIPModel(config)})["clip"]
        load_weights(cls.name, clip, cls.convert(read_state_dict(cls.name, path)), ignore=(POSITION_IDS,))
        return cls(clip, tokenize, options)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename a checkpoint's tensors to transformers' names."""
        return state

    @classmethod
    def random_init(cls, device: torch.device, options: RewardOptions = DEFAULTS) -> Self:
        """Build the published architecture with random weights and a hashing tokenizer."""
        networks = made_on(device, lambda: {"clip": CLIPModel(cls.config)})
        text = cls.config.text_config
        end = text.vocab_size - 1
        tokenize = hash_tokenizer(end - 1, end, 0, end - 1, text.max_position_embeddings)
        return cls(networks["clip"], tokenize, options)
