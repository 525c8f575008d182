"""The layers that get a LoRA: from the entries of `lora.targets` to the names of a network's layers."""

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fastnabla.config.model_sections import LoraConfig, ModelConfig
from fastnabla.models.description import described, loading

ALL_LINEAR = "all-linear"
PATTERN = "regex:"
MAX_SIMILAR = 3
"""Maximum number of similar names in a message."""


def check_targets(model: ModelConfig, lora: LoraConfig) -> None:
    """Check `lora.targets` against the layers of `model`, from its configuration files alone.

    Raises:
        ValueError: see `target_layers`; or the files cannot be read, or describe no network.
    """
    if lora.rank:
        description = described(model)
        with torch.device("meta"), loading(model):
            network = description.family.network_class.from_config(description.network)
        target_layers(network, lora.targets)


def target_layers(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the layers of `network` that get a LoRA, in the network's order.

    An entry of `targets` is a layer's name or the end of it ("to_q", "attn2.to_q"), as for PEFT; "regex:PATTERN", which has
    to match the whole name; or "all-linear". Linear layers and 2-D convolutions can have a LoRA.

    Raises:
        ValueError: an entry matches no layer that can have a LoRA. The message names all such entries, each with what to write
            instead, and says how many layers the others match.
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    found = {target: _matches(target, layers) for target in targets}
    missed = [f"{target!r} {_why_not(target, network, layers)}" for target, names in found.items() if not names]
    if missed:
        matched = [f"{target!r} matches {len(names)} layers" for target, names in found.items() if names]
        raise ValueError(
            f"lora.targets = {tuple(targets)}: {'; '.join([*missed, *matched])}. Give names of linear layers or 2-D "
            f"convolutions, ends of such names, {PATTERN}PATTERN for whole names, or {ALL_LINEAR}."
        )
    chosen = {name for names in found.values() for name in names}
    return [name for name in layers if name in chosen]


def _matches(target: str, layers: dict[str, nn.Module]) -> list[str]:
    if target == ALL_LINEAR:
        return [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    if target.startswith(PATTERN):
        return _matches_pattern(target.removeprefix(PATTERN), layers)
    return [name for name in layers if _ends_with(name, target)]


def _matches_pattern(pattern: str, layers: dict[str, nn.Module]) -> list[str]:
    try:
        return [name for name in layers if re.fullmatch(pattern, name)]
    except re.error:
        return []


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _why_not(target: str, network: nn.Module, layers: dict[str, nn.Module]) -> str:
    """Why `target` matches none of `layers`, and what to write instead."""
    text = target.removeprefix(PATTERN)
    if text == target and len(names := re.split(r"[,;\s]+", text.strip(",; "))) > 1:
        return f"matches no layer; separate the names by blanks: {' '.join(names)}"
    named = next(((name, module) for name, module in network.named_modules() if name and _ends_with(name, text)), None)
    if text == target and named is not None:
        inner = rf"(.*\.)?{re.escape(text)}\..*"
        within = f"; for the layers in it write {PATTERN}{inner}" if _matches_pattern(inner, layers) else ""
        return f"is {named[0]}, of type {type(named[1]).__name__}, which cannot have a LoRA{within}"
    advice = []
    if text and (text != target or set(text) & set("*+?()[]{}|^$\\")):
        glob = text.strip("^$").replace("*", ".*")
        patterns = (text, f".*{text}", glob, f".*{glob}", f".*({glob}).*")
        advice = [f"write {PATTERN}{pattern}" for pattern in patterns if _matches_pattern(pattern, layers)][:1]
    similar = difflib.get_close_matches(text.lower(), _endings(layers, text.count(".") + 2), MAX_SIMILAR)
    advice += [f"similar names: {', '.join(similar)}"] if similar else []
    return "; ".join([f"matches no layer{_invalid(text) if text != target else ''}", *advice])


def _invalid(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        return f", because the pattern is not a regular expression ({error})"
    return ""


def _endings(names: Iterable[str], most: int) -> list[str]:
    """All ends of `names` with up to `most` parts, and `ALL_LINEAR`."""
    parts = [name.split(".") for name in names]
    ends = (".".join(part[-count:]) for part in parts for count in range(1, min(most, len(part)) + 1))
    return list(dict.fromkeys([ALL_LINEAR, *ends]))
