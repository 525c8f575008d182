"""Trained weights on disk: a LoRA as lora/, all parameters as unet/ or transformer/, both in diffusers' formats."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from fastnabla.models.families import FAMILIES
from fastnabla.models.lora import ADAPTER
from fastnabla.models.pipeline import family_of_pipeline, network_of
from fastnabla.models.policy import Policy

LORA_FILE = "pytorch_lora_weights.safetensors"
"""diffusers' name of a LoRA's file."""


def save_policy(policy: Policy, run: Path, dtype: torch.dtype, write: bool = True) -> None:
    """Write the trained weights into the folder `run`. Collective if the policy is sharded.

    Args:
        policy: whose weights to save.
        run: created if it does not exist.
        dtype: of the saved network; a LoRA is saved as float32.
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
            network = policy.family.network_class.from_config(policy.network.config).to(dtype)
            stored = network.state_dict().keys()
            buffers = {name: buffer for name, buffer in policy.network.named_buffers() if name in stored}
            network.load_state_dict(weights | buffers)
            network.save_pretrained(run / policy.family.network)
        return
    if not write:
        return
    # PEFT's parameter names: diffusers' older names cover only attention, and a file that mixes both loads incompletely.
    layers = get_peft_model_state_dict(policy.network, adapter_name=ADAPTER)
    layers = {name: layer.contiguous() for name, layer in layers.items()}
    policy.family.pipeline.save_lora_weights(run / "lora", **{f"{policy.family.network}_lora_layers": layers})


def require_policy(run: Path) -> None:
    """Check that the folder `run` has trained weights.

    Raises:
        ValueError: it has none.
    """
    networks = {family.network for family in FAMILIES.values()}
    if not any((run / trained).is_dir() for trained in ("lora", *networks)):
        raise ValueError(f"{str(run)!r} has no trained weights yet: the run has not reached its first evaluation.")


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
            state = load_file(run / "lora" / LORA_FILE)
            state = {name.removeprefix(f"{policy.family.network}."): layer for name, layer in state.items()}
            suffix = f".{ADAPTER}.weight"
            saved = {name.replace(".weight", suffix): w for name, w in convert_unet_state_dict_to_peft(state).items()}
        else:
            saved = dict(policy.family.network_class.from_pretrained(run / policy.family.network).named_parameters())
        if saved.keys() != trained.keys():
            raise ValueError(
                f"it has {len(saved)} tensors and the policy has {len(trained)}; {len(saved.keys() ^ trained.keys())} "
                "names occur in only one of them"
            )
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(run)!r}: its trained weights do not fit its configuration ({error}).") from error


def load_policy(pipeline: DiffusionPipeline, run: Path) -> None:
    """Load the weights that `save_policy` wrote into the folder `run` into `pipeline`."""
    if (run / "lora").is_dir():
        pipeline.load_lora_weights(run / "lora")
    else:
        family, old = family_of_pipeline(pipeline), network_of(pipeline)
        network = family.network_class.from_pretrained(run / family.network, dtype=old.dtype)
        setattr(pipeline, family.network, network.to(old.device))
