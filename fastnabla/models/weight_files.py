"""The weight files of a pipeline's folder, and which variant of them is loaded."""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from torch import nn

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.families import FAMILIES
from fastnabla.models.model_source import PICKLED, source_of
from fastnabla.models.safetensors_header import SafetensorsHeader
from fastnabla.models.weight_index import require_shards

PARTS = tuple(dict.fromkeys(part for family in FAMILIES.values() for part in family.part_classes))
_SHARD = r"(?:-\d+-of-\d+)?"
WEIGHTS = re.compile(rf"(?:diffusion_pytorch_model|pytorch_model|model){_SHARD}(?:\.(\w+?))?{_SHARD}\.safetensors")
"""Names of weight files; the group is the variant."""

logger = logging.getLogger("fastnabla")


def variant_to_load(model: ModelConfig) -> str | None:
    """The variant of the weights of the pipeline `model`: `model.variant`, or the only one there if there are no others.

    Raises:
        ValueError: no part has the variant, a file is damaged, missing or a pickle, an index names a file elsewhere, or there
            are several variants to choose from.
    """
    folder, field = _folder_of(model), f"model.name = {model.name!r}"
    if folder is None:
        return model.variant
    files = {part: _by_variant(folder / part) for part in PARTS if (folder / part).is_dir()}
    for part, each in files.items():
        if not each and (pickled := sorted(path for path in (folder / part).iterdir() if path.suffix in PICKLED)):
            raise ValueError(
                f"{field}: {part}/{pickled[0].name} is a pickle, which can run any code when it is loaded. Use a copy with "
                ".safetensors files; if you trust it, convert it once with diffusers: P.from_pretrained(FOLDER)."
                "save_pretrained(ANOTHER), where P is its pipeline's class."
            )
    variant = _variant(model, files)
    for part, each in files.items():
        for file in each.get(variant, each.get(None, [])):
            SafetensorsHeader.of(file, field)
        require_shards(folder / part, variant if variant in each else None, field)
    return variant


def require_whole(model: ModelConfig, networks: Mapping[str, nn.Module], variant: str | None) -> None:
    """Check that the files of a loaded pipeline have all weights of its networks.

    Otherwise diffusers leaves weights on the meta device, and transformers draws them at random with a warning.

    Args:
        model: a folder, or a Hub id in the cache.
        networks: the loaded networks, by part.
        variant: the loaded one.

    Raises:
        ValueError: weights are missing. The message counts them for each part.
    """
    folder = _folder_of(model)
    missing = {}
    for part, network in networks.items():
        missing[part] = [name for name, weight in network.named_parameters() if weight.is_meta]
        if part.startswith("text_encoder") and folder is not None:
            each = _by_variant(folder / part)
            files = each.get(variant, each.get(None, []))
            stored = {
                name for file in files for name in SafetensorsHeader.of(file, f"model.name = {model.name!r}").shapes
            }
            missing[part] += _not_stored(network, stored) if files else []
    found = [f"{part}/ lacks {len(names)} weights, such as {names[0]}" for part, names in missing.items() if names]
    if found:
        raise ValueError(
            f"model.name = {model.name!r}: {'; '.join(found)}. Its weight files do not fit its configuration, or are not "
            "complete. Download them again, or correct config.json."
        )


def _not_stored(network: nn.Module, stored: set[str]) -> list[str]:
    """The weights of a transformers model that are not among `stored`. Versions of transformers differ in the prefixes."""
    return [
        name
        for name, _ in network.named_parameters()
        if not any(other == name or other.endswith(f".{name}") or name.endswith(f".{other}") for other in stored)
    ]


def _folder_of(model: ModelConfig) -> Path | None:
    """The folder of the pipeline, which for a Hub id is in the cache; None if it is not there yet."""
    source = source_of(model)
    if Path(source).is_dir():
        return Path(source)
    index = try_to_load_from_cache(str(source), "model_index.json", revision=model.revision)
    return Path(index).parent if isinstance(index, str) else None


def _by_variant(folder: Path) -> dict[str | None, list[Path]]:
    files = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if name := WEIGHTS.fullmatch(path.name):
            files[name[1]].append(path)
    return dict(files)


def _variant(model: ModelConfig, files: dict[str, dict[str | None, list[Path]]]) -> str | None:
    there = sorted({variant for each in files.values() for variant in each if variant is not None})
    if model.variant is not None:
        if files and any(files.values()) and model.variant not in there:
            raise ValueError(
                f"model.variant = {model.variant!r}: no part of model.name = {model.name!r} has it. "
                f"{'There are ' + ', '.join(there) + '.' if there else 'It has no variants.'} Leave it out, or download it."
            )
        return model.variant
    lacking = [each.keys() for each in files.values() if each and None not in each]
    if not lacking:
        return None
    common = sorted(set.intersection(*map(set, lacking)))
    if not common:
        own = "; ".join(
            f"{part}: {', '.join(sorted(filter(None, each)))}" for part, each in files.items() if None not in each
        )
        raise ValueError(
            f"model.name = {model.name!r}: no variant of the weights is there for all parts ({own}). Download one that is."
        )
    if len(common) != 1:
        raise ValueError(
            f"model.name = {model.name!r}: has weights of the variants {', '.join(there)} only. Choose one with --model.variant."
        )
    logger.warning("model.name = %r has only weights of the variant %s, which is loaded.", model.name, common[0])
    return common[0]
