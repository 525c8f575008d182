"""A LoRA under the names of kohya-ss/sd-scripts, which ComfyUI and AUTOMATIC1111's web UI read."""

from pathlib import Path

from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save
from torch import Tensor

from fastnabla.models.families import FAMILIES
from fastnabla.models.saved_policy import LORA_FILE
from fastnabla.utils.durable import write_file
from fastnabla.utils.safetensors_file import read_tensors

RENAMED = {
    "lora_unet_add_embedding_linear_1.": "lora_unet_label_emb_0_0.",
    "lora_unet_add_embedding_linear_2.": "lora_unet_label_emb_0_2.",
}
"""Prefixes that diffusers' converter and the readers, diffusers' own among them, spell differently: the size conditions of
Stable Diffusion XL."""


def to_kohya(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's tensors under kohya's names.

    ``unet.mid_block.attentions.0.proj_in.lora_A.weight`` becomes ``lora_unet_mid_block_attentions_0_proj_in.lora_down.weight``,
    ``lora_B`` becomes ``lora_up``, and each layer gets an ``alpha``, a scalar, equal to its rank, so the scale remains 1.

    Args:
        lora: as `fastnabla.models.saved_policy` saves it, with PEFT's names and alpha = rank.
    """
    tensors = convert_state_dict_to_kohya(lora)
    for old, new in RENAMED.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return {name: tensor.float() for name, tensor in tensors.items()}  # diffusers' alphas are whole numbers


def save_kohya(weights: Path, file: Path) -> None:
    """Write the LoRA in the folder `weights` to `file`, in safetensors, under kohya's names.

    Args:
        weights: a folder that `fastnabla.models.saved_policy.save_policy` wrote.
        file: is replaced atomically if it exists.

    Raises:
        ValueError: there is no LoRA because all parameters were trained, or it cannot be read.
    """
    if not (weights / "lora").is_dir():
        networks = {family.network for family in FAMILIES.values()}
        trained = next((name for name in sorted(networks) if (weights / name).is_dir()), "unet")
        raise ValueError(
            f"{str(weights)!r} has no lora/: the run trained all parameters (lora.rank = 0). Use its {trained}/ as "
            "docs/export.md describes."
        )
    lora = read_tensors(weights / "lora" / LORA_FILE)
    if not all(name.startswith("unet.") for name in lora):
        raise ValueError(
            f"{str(weights / 'lora')!r}: kohya's names are those of Stable Diffusion 1, 2 and XL, and this is the LoRA of a "
            f"transformer; load {LORA_FILE} with diffusers' load_lora_weights."
        )
    write_file(file, save(to_kohya(lora), metadata={"format": "pt"}))
