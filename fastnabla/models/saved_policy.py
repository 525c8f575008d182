"""Trained weights on disk: a LoRA as lora/, all parameters as unet/ or transformer/, both in diffusers' formats."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from fastnabla.distributed.sharding import whole
from fastnabla.models.families import FAMILIES, Family
from fastnabla.models.lora import ADAPTER
from fastnabla.models.pipeline import family_of_pipeline, network_of
from fastnabla.models.policy import Policy
from fastnabla.utils.safetensors_file import read_tensors
from fastnabla.utils.same_tensors import require_same_tensors

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
            weight = whole(parameter.detach().to(dtype))
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
    with _fitting(run):
        if policy.is_lora:
            suffix = f".{ADAPTER}.weight"
            saved = {name.replace(".weight", suffix): w for name, w in _read_lora(run, policy.family).items()}
        else:
            saved = dict(_read_network(run, policy.family).named_parameters())
        require_same_tensors(saved, trained)
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def load_policy(pipeline: DiffusionPipeline, run: Path) -> None:
    """Load the weights that `save_policy` wrote into the folder `run` into `pipeline`.

    Raises:
        ValueError: they cannot be read, or belong to another network.
    """
    family, old = family_of_pipeline(pipeline), network_of(pipeline)
    with _fitting(run):
        if (run / "lora").is_dir():
            lora = _read_lora(run, family)
            old.load_lora_adapter(lora, prefix=None)
            # diffusers leaves out what the network has no layer for, with a warning.
            (adapter,) = pipeline.get_active_adapters()
            require_same_tensors(lora, get_peft_model_state_dict(old, adapter_name=adapter))
        else:
            network = _read_network(run, family, dtype=old.dtype)
            require_same_tensors(dict(network.named_parameters()), dict(old.named_parameters()))
            setattr(pipeline, family.network, network.to(old.device))


@contextlib.contextmanager
def _fitting(run: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:  # of the libraries
        why = " ".join(str(error).split())
        raise ValueError(f"{str(run)!r}: its trained weights do not fit its configuration ({why:.500}).") from error


def _read_lora(run: Path, family: Family) -> dict[str, Tensor]:
    """The LoRA by PEFT's names."""
    prefix = f"{family.network}."
    lora = read_tensors(run / "lora" / LORA_FILE)
    for name, weight in lora.items():
        if not name.startswith(prefix):
            raise ValueError(f"{name!r} is not a layer of {family.network}")
        if not weight.is_floating_point():
            raise ValueError(f"{name!r} is of the type {weight.dtype}; must be floating-point")
    return convert_unet_state_dict_to_peft({name.removeprefix(prefix): weight for name, weight in lora.items()})


def _read_network(run: Path, family: Family, **settings: Any) -> nn.Module:
    return family.network_class.from_pretrained(run / family.network, use_safetensors=True, **settings)
