"""`python -m fastnabla.rewards check SPEC…`: try rewards on sample images. `… list`: the named ones."""

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

from fastnabla.config.sections import Precision, Preprocess
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
from fastnabla.utils.console import print_error, quiet_libraries

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
MARKS = {True: "[green]passed[/]", False: "[bold red]failed[/]", None: ""}


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckConfig:
    """Try rewards on sample images: shape, finiteness, gradient against finite differences, independence of a batch's
    rows, use of prompts, time and memory. Exits with 0 if all pass, 1 if one fails, 2 if it could not be tried.

    For example: python -m fastnabla.rewards check my_rewards:warm; or hpsv2 --random-init, before any download.
    """

    spec: tyro.conf.Positional[tuple[str, ...]]
    """Rewards, as in --reward.terms: a name, or module:function."""
    images: Path | None = None
    """Folder of images to try it on, in alphabetical order, cropped to the square; None: synthetic ones."""
    size: int = 512
    """Height and width that images are brought to."""
    batch: int = 2
    """Images tried at once."""
    prompts: tuple[str, ...] = ("a photo of a giraffe", "a painting of an elephant")
    """At least two, repeated as needed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes a GPU if there is one."""
    weights: tuple[str, ...] = ()
    """Where weights are, each name=source, as in hpsv2=models/HPSv2: a hub id, a local folder or file. The command
    "list" names the parts."""
    preprocess: Preprocess = "official"
    """Images as each scorer was trained with, or as the reference implementation of ∇-DB has them."""
    checkpoint: bool = False
    """Recompute transformer layers in the backward pass."""
    precision: Precision | None = None
    """What the published rewards compute in, as --reward.precision. Gradient and rows are tested in float32, which shows
    mistakes; how far values and gradient are from float32 is told beside."""
    random_init: bool = False
    """Random weights of the real size, without any download; only time, memory and gradient mean anything."""

    def __post_init__(self) -> None:
        if not self.spec:
            raise ValueError(f"spec is empty: name at least one of {', '.join(REWARDS)} or a module:function.")
        if self.size < 1:
            raise ValueError(f"size = {self.size}: must be at least 1.")
        if self.batch < 2:
            raise ValueError(f"batch = {self.batch}: must be at least 2, to see whether rows are independent.")
        if len(set(self.prompts)) < 2:
            raise ValueError(f"prompts = {self.prompts}: give at least two different ones, to see whether they count.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = 'cuda': torch sees no GPU here; use --device cpu.")


@dataclasses.dataclass(kw_only=True, slots=True)
class ListConfig:
    """Name the built-in rewards, and the commands that fetch their weights."""


def sample_images(folder: Path | None, count: int, size: int) -> Tensor:
    """Images `[count, 3, size, size]`: the folder's first, or smooth synthetic ones with some noise.

    Raises:
        ValueError: the folder has fewer.
    """
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        coarse = F.interpolate(torch.rand(count, 3, 6, 6, generator=generator), (size, size), mode="bicubic")
        return (coarse + 0.05 * torch.randn(coarse.shape, generator=generator)).clamp(0, 1)
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGES)[:count]
    if len(paths) < count:
        raise ValueError(f"images = {str(folder)!r}: has {len(paths)} images, --batch wants {count}.")
    pictures = [ImageOps.fit(Image.open(path).convert("RGB"), (size, size)) for path in paths]
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])


def check(config: CheckConfig, console: Console) -> bool:
    """Print a table of findings for each reward; whether all passed.

    Raises:
        ValueError: a reward cannot be built, or refuses the prompts.
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
        found = inspect_reward(reward, images, prompts, in_float32(name, reward, images.device, options))
        table = Table(title=f"{name} on {config.batch} images of {config.size} × {config.size}, {device}")
        for column in ("what", "result", ""):
            table.add_column(column)
        for finding in found:
            table.add_row(finding.what, finding.result, MARKS[finding.passed])
        console.print(table)
        findings += found
    return all(finding.passed is not False for finding in findings)


def in_float32(name: str, reward: RewardFunction, device: torch.device, options: RewardOptions) -> RewardModel | None:
    """The same reward in float32; None if it computes in that, or its precision is its own affair."""
    if not isinstance(reward, RewardModel) or precision_on(device, reward.precision) == "float32":
        return None
    if name in PUBLISHED:
        return published_class(name).build(device, dataclasses.replace(options, precision="float32"))
    exact = copy.copy(reward)
    exact.precision = "float32"
    return exact


def list_rewards(console: Console) -> None:
    """Print the named rewards, and where the published ones come from."""
    console.print(f"Embedded: {', '.join(name for name in REWARDS if name not in PUBLISHED)}.")
    for name in PUBLISHED:
        cls = published_class(name)
        what = (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0]
        console.print(f"\n[bold]{name}[/]: {what}", highlight=False)
        for part, source in cls.parts().items():
            console.print(f"  {part}: {source.command}", highlight=False, soft_wrap=True)


def main(arguments: list[str]) -> int:
    """Run the command line; the exit status."""
    quiet_libraries()
    console = Console()
    try:
        config = tyro.extras.subcommand_cli_from_dict(
            {"check": CheckConfig, "list": ListConfig},
            prog="python -m fastnabla.rewards",
            description="Rewards on their own, outside a run.",
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
