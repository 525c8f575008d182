"""Human Preference Score v2.1 (arXiv 2306.09341): CLIP ViT-H/14 finetuned on human rankings of generated images."""

from typing import ClassVar

from torch import Tensor

from fastnabla.rewards.clip import VIT_H_14, ClipReward
from fastnabla.rewards.preprocess import pad_long_side
from fastnabla.rewards.text import clean_prompt
from fastnabla.rewards.weights import Source

TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's tensors to those of transformers' `CLIPModel`. Unknown names are kept.

    open_clip stores query, key and value as one tensor, and the projections transposed.
    """
    converted = {}
    for name, tensor in state.items():
        source = next((prefix for prefix in TOWERS if name.startswith(prefix)), None)
        if source is not None:
            layer, _, part = name.removeprefix(source).partition(".")
            prefix = f"{TOWERS[source]}{layer}."
            if part.startswith("attn.in_proj_"):
                kind = part.removeprefix("attn.in_proj_")
                for which, third in zip("qkv", tensor.chunk(3), strict=True):
                    converted[f"{prefix}self_attn.{which}_proj.{kind}"] = third
            else:
                module, _, kind = part.rpartition(".")
                converted[f"{prefix}{LAYERS.get(module, module)}.{kind}"] = tensor
        elif name in PROJECTIONS:
            converted[PROJECTIONS[name]] = tensor.T
        elif name != "attn_mask":  # a constant
            converted[OUTSIDE.get(name, name)] = tensor
    return converted


class HPSv2(ClipReward):
    """The cosine similarity, in [-1, 1], without CLIP's learned scale.

    The checkpoint is in open_clip's format and float16, and is converted to float32.
    """

    name = "hpsv2"
    config = VIT_H_14
    resize = staticmethod(pad_long_side)
    convert = staticmethod(from_open_clip)
    sources: ClassVar[dict[str, Source]] = {
        "": Source("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)),
        "tokenizer": Source("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ("vocab.json", "merges.txt")),
    }

    def encode_prompt(self, prompt: str) -> Tensor:
        """Normalised embedding `[D]` of `prompt`, cleaned as in open_clip."""
        return super().encode_prompt(clean_prompt(prompt))
