"""`python -m fastnabla.rewards check SPEC…` tests rewards on sample images; `… list` names the built-in ones."""

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastnabla.config.model_sections import Precision, Preprocess
from fastnabla.distributed.launch import require_single_process
from fastnabla.rewards import (
    PUBLISHED,
    REWARDS,
    RewardFunction,
    RewardOptions,
    build_reward,
    parse_weights,
    published_class,
)
from fastnabla.rewards.inspection import Finding, inspect_reward
from fastnabla.rewards.model import RewardModel
from fastnabla.rewards.precision import precision_on
from fastnabla.utils.console import command_console, print_error, quiet_libraries
from fastnabla.utils.user_code import in_words

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
MARKS = {True: "[green]passed[/]", False: "[bold red]failed[/]", None: ""}


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckConfig:
    """Test rewards on sample images: output shape, finite values, gradient against finite differences, independence of
    the rows of a batch, use of prompts, time and memory. Exit status: 0 if all tests pass, 1 if one fails, 2 if a reward
    could not be run.

    Examples: python -m fastnabla.rewards check my_rewards:warm; or, before any download, hpsv2 --random-init.
    """

    spec: tyro.conf.Positional[tuple[str, ...]]
    """Rewards, as in --reward.terms: a name, or module:function."""
    images: Path | None = None
    """Folder of test images, taken in alphabetical order and cropped to a square. None: synthetic images."""
    size: int = 512
    """Height and width to which images are resized."""
    batch: int = 2
    """Images per batch."""
    prompts: tuple[str, ...] = ("a photo of a giraffe", "a painting of an elephant")
    """At least two different prompts, repeated as needed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" uses a GPU if there is one."""
    weights: tuple[str, ...] = ()
    """Sources of weights, each name=source, for example hpsv2=models/HPSv2. A source is a hub id, a local folder or a local
    file. The command "list" names the parts."""
    preprocess: Preprocess = "official"
    """"official": preprocess images as in each scorer's training. "reference": as in the reference implementation of
    ∇-DB."""
    checkpoint: bool = False
    """Recompute transformer layers in the backward pass."""
    precision: Precision | None = None
    """Precision of the published rewards, as in --reward.precision. Gradient and rows are tested in float32, where mistakes
    show. The report also gives the deviation of values and gradients from float32."""
    random_init: bool = False
    """Use random weights of the real size and download nothing. Only time, memory and gradient are meaningful."""

    def __post_init__(self) -> None:
        if not self.spec:
            raise ValueError(f"spec is empty: name at least one of {', '.join(REWARDS)} or a module:function.")
        if self.size < 1:
            raise ValueError(f"size = {self.size}: must be at least 1.")
        if self.batch < 2:
            raise ValueError(f"batch = {self.batch}: must be at least 2, to test whether rows are independent.")
        if len(set(self.prompts)) < 2:
            raise ValueError(
                f"prompts = {self.prompts}: give at least two different ones, to test whether the reward uses them."
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = 'cuda': torch finds no GPU; use --device cpu.")


@dataclasses.dataclass(kw_only=True, slots=True)
class ListConfig:
    """List the built-in rewards and the commands that download their weights."""


def sample_images(folder: Path | None, count: int, size: int) -> Tensor:
    """The first images of a folder, or smooth synthetic ones with some noise, `[count, 3, size, size]` in [0, 1].

    Raises:
        ValueError: the folder has fewer than `count` images, or one of them cannot be read.
    """
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        coarse = F.interpolate(torch.rand(count, 3, 6, 6, generator=generator), (size, size), mode="bicubic")
        return (coarse + 0.05 * torch.randn(coarse.shape, generator=generator)).clamp(0, 1)
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGES)[:count]
    if len(paths) < count:
        raise ValueError(f"images = {str(folder)!r}: has {len(paths)} images, --batch needs {count}.")
    return torch.stack([_read_square(path, size) for path in paths])


def _read_square(path: Path, size: int) -> Tensor:
    try:
        picture = ImageOps.fit(Image.open(path).convert("RGB"), (size, size))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"images: {str(path)!r} cannot be read ({error}); replace or remove it.") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def check(config: CheckConfig, console: Console) -> bool:
    """Print a table of findings for each reward and return whether all passed.

    Raises:
        ValueError: a reward cannot be built, or fails; the message names it and the place.
    """
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    options = RewardOptions(
        weights=parse_weights(config.weights),
        preprocess=config.preprocess,
        checkpoint=config.checkpoint,
        precision=config.precision,
        random_init=config.random_init,
    )
    images = sample_images(config.images, config.batch, config.size).to(device)
    prompts = [config.prompts[i % len(config.prompts)] for i in range(config.batch)]
    findings: list[Finding] = []
    for name, (reward, _) in build_reward(config.spec, device, options).terms.items():
        try:
            found = inspect_reward(reward, images, prompts, in_float32(name, reward, images.device, options))
        except Exception as error:  # the reward's own code may raise anything
            raise ValueError(f"reward {name!r} failed on images {tuple(images.shape)} ({in_words(error)}).") from error
        table = Table(title=f"{name} on {config.batch} images of {config.size} × {config.size}, {device}")
        for column in ("what", "result", ""):
            table.add_column(column)
        for finding in found:
            table.add_row(finding.what, finding.result, MARKS[finding.passed])
        console.print(table)
        findings += found
    return all(finding.passed is not False for finding in findings)


def in_float32(name: str, reward: RewardFunction, device: torch.device, options: RewardOptions) -> RewardModel | None:
    """The same reward in float32. None if it already computes in float32, or is not a `RewardModel`.

    One of your own keeps the weights that it has, also those that it stores in bfloat16.
    """
    if not isinstance(reward, RewardModel) or precision_on(device, reward.precision) == "float32":
        return None
    if name in PUBLISHED:
        return published_class(name).build(device, dataclasses.replace(options, precision="float32"))
    exact = copy.deepcopy(reward).float()  # which empties the prompt cache
    exact.precision = "float32"
    return exact


def list_rewards(console: Console) -> None:
    """Print the built-in rewards, and the download commands of those with published weights."""
    console.print(f"Testbed: {', '.join(name for name in REWARDS if name not in PUBLISHED)}.")
    for name in PUBLISHED:
        cls = published_class(name)
        summary = (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0]
        console.print(f"\n[bold]{name}[/]: {summary}", highlight=False)
        for part, source in cls.parts().items():
            console.print(f"  {part}: {source.command}", highlight=False, soft_wrap=True)


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    quiet_libraries()
    console = command_console()
    try:
        require_single_process()
        config = tyro.extras.subcommand_cli_from_dict(
            {"check": CheckConfig, "list": ListConfig},
            prog="python -m fastnabla.rewards",
            description="Test and list rewards.",
            args=arguments,
        )
        if isinstance(config, ListConfig):
            list_rewards(console)
            return 0
        passed = check(config, console)
    except ValueError as error:
        print_error(error)
        return 2
    console.print("all passed" if passed else "not all passed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
