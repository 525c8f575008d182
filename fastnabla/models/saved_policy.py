"""Trained weights on disk: a LoRA as lora/, all parameters as unet/, both in diffusers' formats."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from torch.distributed.tensor import DTensor

from fastnabla.models.lora import ADAPTER
from fastnabla.models.model_config import Pipeline
from fastnabla.models.policy import Policy


def save_policy(policy: Policy, run: Path, dtype: torch.dtype, write: bool = True) -> None:
    """Write the trained weights into the folder `run`. Collective if the policy is sharded.

    Args:
        policy: whose weights to save.
        run: created if it does not exist.
        dtype: of the saved UNet; a LoRA is saved as float32.
        write: whether this process writes.
    """
    if not policy.is_lora:
        weights = {}
        for name, parameter in policy.trained().items():
            weight = parameter.detach().to(dtype)
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if write:
                weights[name] = weight.cpu()
        if write:
            unet = UNet2DConditionModel.from_config(policy.unet.config).to(dtype)
            unet.load_state_dict(weights)
            unet.save_pretrained(run / "unet")
        return
    if not write:
        return
    # PEFT's parameter names: diffusers' older names cover only attention, and a file that mixes both loads incompletely.
    layers = get_peft_model_state_dict(policy.unet, adapter_name=ADAPTER)
    layers = {name: layer.contiguous() for name, layer in layers.items()}
    StableDiffusionPipeline.save_lora_weights(run / "lora", unet_lora_layers=layers)


def require_policy(run: Path) -> None:
    """Check that the folder `run` has trained weights.

    Raises:
        ValueError: it has none.
    """
    if not any((run / trained).is_dir() for trained in ("lora", "unet")):
        raise ValueError(f"{str(run)!r} has no lora/ or unet/ yet: the run has not reached its first evaluation.")


@torch.no_grad()
def read_policy(policy: Policy, run: Path) -> None:
    """Load the weights that `save_policy` wrote into the folder `run` into `policy`, which is built with the run's
    configuration.

    Raises:
        ValueError: there are no weights, they cannot be read, or they belong to another network or LoRA.
    """
    require_policy(run)
    trained = policy.trained()
    try:
        if policy.is_lora:
            state, _ = StableDiffusionPipeline.lora_state_dict(run / "lora")
            state = {name.removeprefix("unet."): layer for name, layer in state.items()}
            suffix = f".{ADAPTER}.weight"
            saved = {name.replace(".weight", suffix): w for name, w in convert_unet_state_dict_to_peft(state).items()}
        else:
            saved = UNet2DConditionModel.from_pretrained(run / "unet").state_dict()
        if saved.keys() != trained.keys():
            raise ValueError(
                f"it has {len(saved)} tensors and the policy has {len(trained)}; {len(saved.keys() ^ trained.keys())} "
                "names occur in only one of them"
            )
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(run)!r}: its trained weights do not fit its configuration ({error}).") from error


def load_policy(pipeline: Pipeline, run: Path) -> None:
    """Load the weights that `save_policy` wrote into the folder `run` into `pipeline`."""
    if (run / "lora").is_dir():
        pipeline.load_lora_weights(run / "lora")
    else:
        unet = UNet2DConditionModel.from_pretrained(run / "unet", dtype=pipeline.unet.dtype)
        pipeline.unet = unet.to(pipeline.unet.device)
