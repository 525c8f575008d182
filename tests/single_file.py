"""A pipeline's weights in one file, in the layout of Stable Diffusion's original implementation.

The reverse of the conversion in `diffusers.loaders.single_file_utils`, for a UNet and a VAE with one layer per block.
"""

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k",
    "to_v": "v", "to_out.0": "proj_out", "downsamplers.0.conv": "downsample.conv", "upsamplers.0.conv": "upsample.conv",
}  # fmt: skip


def _unet_name(name: str) -> str:
    for theirs, ours in _UNET.items():
        name = re.sub(rf"^{re.escape(theirs)}\.", f"{ours}.", name)
    if block := re.match(
        r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(conv\.)?", name
    ):
        way, level, kind, layer = block[1], int(block[2]), block[3], int(block[4])
        start = 2 * level + layer + (way == "down")
        place = {"resnets": f"{start}.0", "attentions": f"{start}.1", "downsamplers": f"{start + 1}.0.op"}
        # The upsampler follows the last layer and its attention, if the level has one.
        place["upsamplers"] = f"{2 * level + 1}.1.conv"
        name = f"{'input' if way == 'down' else 'output'}_blocks.{place[kind]}.{name[block.end() :]}"
    if "transformer_blocks" not in name:
        for theirs, ours in _RESNET.items():
            name = re.sub(rf"\.{theirs}\.", f".{ours}.", name)
    return f"model.diffusion_model.{name}"


def _vae_name(name: str, levels: int) -> str:
    for theirs, ours in _VAE.items():
        name = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\g<1>{ours}.", name)
    name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name).replace("resnets", "block")
    return "first_stage_model." + re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)


def _vae_weight(name: str, weight: Tensor) -> Tensor:
    """The original attention of the VAE has 1 × 1 convolutions."""
    return weight[..., None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else weight


def save_single_file(pipeline: StableDiffusionPipeline, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the weights of a Stable Diffusion 1 pipeline to `path`."""
    levels = len(pipeline.vae.config.block_out_channels)
    tensors = {_unet_name(name): weight for name, weight in pipeline.unet.state_dict().items()}
    for name, weight in pipeline.vae.state_dict().items():
        original = _vae_name(name, levels)
        tensors[original] = _vae_weight(original, weight)
    texts = pipeline.text_encoder.state_dict()
    prefix = "" if next(iter(texts)).startswith("text_model.") else "text_model."
    tensors |= {f"cond_stage_model.transformer.{prefix}{name}": weight for name, weight in texts.items()}
    save_file({name: weight.contiguous() for name, weight in tensors.items()}, path, metadata)
