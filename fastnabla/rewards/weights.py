"""Published weights: find the files, read them without pickle, and load them with every key accounted for."""

import dataclasses
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastnabla.utils.safetensors_file import read_tensors

logger = logging.getLogger(__name__)
SHOWN = 3  # number of keys named in a message


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a part of a reward is published."""

    repository: str
    """Hub id."""
    files: tuple[str, ...]
    """Required files."""

    def __str__(self) -> str:
        return f"{self.repository} ({', '.join(self.files)})"

    @property
    def command(self) -> str:
        """The command that downloads it into the hub's cache."""
        return f"hf download {self.repository} {' '.join(self.files)}"


def find_files(part: str, published: Source, source: str | None) -> list[Path]:
    """Local paths of the files of `published`, in the same order.

    A cached copy of a hub repository is used without checking for a newer version. Files that are not cached are
    downloaded.

    Args:
        part: name of the part, as in `RewardOptions.weights`; for messages.
        published: the files, and where they are published.
        source: a local folder that contains the files, a local file of any name if only one is needed, or another hub
            id; None for the published one.

    Raises:
        ValueError: a file is missing, or cannot be downloaded.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    local = Path(os.path.expanduser(source)) if source is not None else None
    if local is not None and local.is_file():
        if len(published.files) > 1:
            raise ValueError(
                f"weights: {part}={source} is a file; give the folder that contains {', '.join(published.files)}."
            )
        return [local]
    if local is not None and local.is_dir():
        if missing := [name for name in published.files if not (local / name).is_file()]:
            raise ValueError(
                f"weights: {part}={source} has no {', '.join(missing)}. Download it with: {published.command} "
                f"--local-dir {source}"
            )
        return [local / name for name in published.files]
    if source is not None:
        try:
            validate_repo_id(source)
        except HFValidationError as error:
            raise ValueError(
                f"weights: {part}={source} is neither an existing file or folder nor a hub id; give {part}=PATH or "
                f"{part}=OWNER/NAME."
            ) from error
    published = dataclasses.replace(published, repository=source or published.repository)
    return [_from_hub(part, published, name) for name in published.files]


def _from_hub(part: str, published: Source, name: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(published.repository, name)
    if isinstance(cached, str):
        return Path(cached)
    logger.info("reward %s: downloading %s of %s", part, name, published.repository)
    try:
        return Path(hf_hub_download(published.repository, name))
    except Exception as error:
        raise ValueError(
            f"reward {part!r}: {name} of {published.repository} is not in the hub's cache and cannot be downloaded "
            f"({type(error).__name__}). Download it on a machine with network access: {published.command} "
            f"— or give a local copy in the rewards' weights: {part}=PATH"
        ) from error


def read_state_dict(part: str, path: Path) -> dict[str, Tensor]:
    """Read tensors by name, on the CPU, from a safetensors or torch file, without executing pickled code.

    For a training checkpoint, the entry ``state_dict`` is returned.

    Raises:
        ValueError: the file is damaged or truncated, or does not contain a dictionary of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"reward {part!r}: {path} cannot be read ({type(error).__name__}: {error}). Is the download complete?"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"reward {part!r}: {path} contains no dictionary of tensors.")
    return loaded


def load_weights(part: str, network: nn.Module, state: dict[str, Tensor], ignore: Iterable[str] = ()) -> None:
    """Copy `state` into `network`, converting dtypes.

    Args:
        part: name of the reward's part, for messages.
        network: receives the weights.
        state: tensors by the network's parameter names.
        ignore: regular expressions of names in `state` to skip.

    Raises:
        ValueError: names are missing or unexpected, or shapes differ.
    """
    ignored = [re.compile(pattern) for pattern in ignore]
    state = {name: value for name, value in state.items() if not any(pattern.search(name) for pattern in ignored)}
    expected = network.state_dict()
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "with another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(problems.values()):
        described = [
            f"{len(names)} {problem}: {', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}"
            for problem, names in problems.items()
            if names
        ]
        raise ValueError(f"reward {part!r}: the weights do not fit the network. {'; '.join(described)}.")
    network.load_state_dict(state)
