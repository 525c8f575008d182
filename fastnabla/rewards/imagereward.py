"""ImageReward (arXiv 2304.05977): BLIP finetuned on human rankings; its text tower attends to the image."""

import functools
import re
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from fastnabla.rewards.head import ScoreHead
from fastnabla.rewards.options import DEFAULTS, RewardOptions
from fastnabla.rewards.preprocess import crop_short_side
from fastnabla.rewards.published import PublishedReward, made_on
from fastnabla.rewards.text import Tokenize, bert_tokenizer, hash_tokenizer
from fastnabla.rewards.weights import Source, load_weights, read_state_dict

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the head's output over the authors' data; used to standardise the reward."""
MAX_LENGTH = {"official": 35, "reference": 512}
"""Token ids, including [CLS] and [SEP], to which a prompt is truncated."""
VISION = BlipVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=16,
    layer_norm_eps=1e-6,
    initializer_range=0.02,
)
TEXT = BlipTextConfig(
    vocab_size=30524,  # BERT's, plus two that prompts never use
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=512,
    encoder_hidden_size=1024,
)
UNUSED = (r"^blip\.vision_proj\.", r"^blip\.text_proj\.", r"^text\.embeddings\.position_ids$")
NAMES = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm", r"vision.encoder.layers.\1.layer_norm"),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
)


def from_image_reward(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of the package image-reward to those of `ImageReward`. Unknown names are kept."""
    converted = {}
    for name, tensor in state.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    return converted


class ImageReward(PublishedReward):
    """The predicted preference, standardised.

    Args:
        vision: image tower.
        text: bidirectional text tower with cross-attention to the image tokens; without pooler.
        head: takes the text tower's hidden state of the first token.
        tokenize: prompt → token ids from [CLS] to [SEP], without padding.
        options: settings.
    """

    name = "imagereward"
    sources: ClassVar[dict[str, Source]] = {
        "": Source("THUDM/ImageReward", ("ImageReward.pt",)),
        "tokenizer": Source("google-bert/bert-base-uncased", ("vocab.txt",)),
    }
    image_networks = ("vision", "text")
    vision: BlipVisionModel
    text: BlipTextModel
    head: ScoreHead

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        head: ScoreHead,
        tokenize: Tokenize,
        options: RewardOptions = DEFAULTS,
    ) -> None:
        resize = functools.partial(crop_short_side, size=vision.config.image_size)
        super().__init__(resize, options, vision=vision, text=text, head=head)
        self.tokenize = tokenize

    def encode_prompt(self, prompt: str) -> Tensor:
        """Token ids of `prompt`. Nothing more can be cached: every layer of the text tower attends to the image."""
        return torch.tensor(self.tokenize(prompt), device=self.text.device)

    def score(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards `[B]`."""
        rows = [self.prompt_cache(prompt) for prompt in prompts]
        image = self.vision(pixel_values).last_hidden_state
        # A row's result must not depend on its neighbours, to the bit: batches are padded to the same length, and a prompt
        # that is longer is read by itself.
        hidden = list(self._read(rows, MAX_LENGTH["official"], image))
        for i, row in enumerate(rows):
            if len(row) > MAX_LENGTH["official"]:
                (hidden[i],) = self._read([row], len(row), image[i : i + 1])
        return (self.head(torch.stack(hidden)) - MEAN) / STD

    def _read(self, rows: Sequence[Tensor], length: int, image: Tensor) -> Tensor:
        """The text tower's hidden state of the first token, of token ids padded or cut to `length` and the image tokens."""
        ids = torch.stack([F.pad(row, (0, length - len(row)), value=-1) for row in rows])
        # An additive mask. For a mask of zeros and ones transformers checks whether it is all ones, which synchronises.
        mask = (ids < 0)[:, None, None].to(self.text.dtype) * torch.finfo(self.text.dtype).min
        hidden = self.text(input_ids=ids.clamp_min(0), attention_mask=mask, encoder_hidden_states=image)
        return hidden.last_hidden_state[:, 0]

    @classmethod
    def from_weights(
        cls,
        device: torch.device,
        options: RewardOptions = DEFAULTS,
        config: tuple[BlipVisionConfig, BlipTextConfig] = (VISION, TEXT),
    ) -> Self:
        """Load the published weights.

        Args:
            device: device of the networks.
            options: settings; `weights` may name copies of the weights and of ``tokenizer``.
            config: architectures of image and text tower.

        Raises:
            ValueError: weights are missing or damaged, or do not fit the network; or the tokenizer does not fit the text
                tower.
        """
        (path,), (vocab,) = cls.find(cls.name, options), cls.find(f"{cls.name}.tokenizer", options)
        longest = min(MAX_LENGTH[options.preprocess], config[1].max_position_embeddings)
        tokenize = bert_tokenizer(vocab, config[1].vocab_size - 2, longest)
        networks = nn.ModuleDict(_networks(device, *config))
        load_weights(cls.name, networks, from_image_reward(read_state_dict(cls.name, path)), ignore=UNUSED)
        return cls(**networks, tokenize=tokenize, options=options)

    @classmethod
    def random_init(cls, device: torch.device, options: RewardOptions = DEFAULTS) -> Self:
        """Build the published architecture with random weights and a hashing tokenizer."""
        tokenize = hash_tokenizer(101, 102, 1000, TEXT.vocab_size - 2, MAX_LENGTH[options.preprocess])
        return cls(**_networks(device, VISION, TEXT), tokenize=tokenize, options=options)


def _networks(device: torch.device, vision: BlipVisionConfig, text: BlipTextConfig) -> dict[str, nn.Module]:
    return made_on(
        device,
        lambda: {
            "vision": BlipVisionModel(vision),
            "text": BlipTextModel(text, add_pooling_layer=False),
            "head": ScoreHead(text.hidden_size),
        },
    )
