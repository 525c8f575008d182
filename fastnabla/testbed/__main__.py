"""`python -m fastnabla.testbed [--model testbed-flow] [--folder DIR] [--guidance-scale W]`: measure a testbed's model.

From 500 samples with plain diffusers: the fraction that the evaluation classifier assigns to the prompt's animal, and the
entropy of their hues, compared with as many tinted silhouettes from the test split.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor

from fastnabla.distributed.launch import require_single_process
from fastnabla.metrics.diversity import hue_entropy, mean_hue
from fastnabla.run.pictures import save_grid
from fastnabla.testbed import flow_pipeline_folder, pipeline_folder
from fastnabla.testbed.classifier import load_classifier
from fastnabla.testbed.networks import PROMPT_TOKENS
from fastnabla.testbed.silhouettes import ANIMALS, caption, load_masks, tint
from fastnabla.utils.console import command_console, print_error, quiet_libraries
from fastnabla.utils.require import require


@dataclasses.dataclass(kw_only=True, slots=True)
class ReportConfig:
    """Measure a testbed's pretrained pipeline."""

    model: Literal["testbed", "testbed-flow"] = "testbed"
    """testbed: the diffusion model. testbed-flow: the flow model."""
    folder: Path | None = None
    """Pipeline folder of that kind. None: the shipped one."""
    samples: int = 50
    """Samples per animal."""
    steps: int | None = None
    """DDIM steps with η = 1 (testbed) or Euler steps (testbed-flow). None: 20 or 28."""
    guidance_scale: float = 3.0
    """Scale w of classifier-free guidance."""
    picture: Path = Path("runs/testbed.png")
    """PNG file for the grid of samples."""

    def __post_init__(self) -> None:
        require(self.samples >= 1, "samples", self.samples, "must be at least 1.")


def sampler(config: ReportConfig) -> Callable[[list[str], torch.Generator], Tensor]:
    """A function from prompts and a generator to images `[N, 3, 32, 32]` in [0, 1], sampled by plain diffusers."""
    if config.model == "testbed":
        pipe = StableDiffusionPipeline.from_pretrained(
            str(config.folder or pipeline_folder()), dtype=torch.float32, use_safetensors=True
        )
        settings = {"num_inference_steps": config.steps or 20, "eta": 1.0}
    else:
        pipe = StableDiffusion3Pipeline.from_pretrained(
            str(config.folder or flow_pipeline_folder()), dtype=torch.float32, use_safetensors=True
        )
        settings = {"num_inference_steps": config.steps or 28, "max_sequence_length": PROMPT_TOKENS}
    pipe.set_progress_bar_config(disable=True)

    def sample(prompts: list[str], generator: torch.Generator) -> Tensor:
        output = pipe(prompts, generator=generator, guidance_scale=config.guidance_scale, output_type="pt", **settings)
        return output.images.float()

    return sample


def report(config: ReportConfig) -> dict[str, float]:
    """Sample, write the grid and return the measures by name."""
    sample = sampler(config)
    labels = torch.arange(len(ANIMALS)).repeat_interleave(config.samples)
    parts = [
        sample([caption(ANIMALS[i]) for i in part.tolist()], torch.Generator().manual_seed(number))
        for number, part in enumerate(labels.split(100))
    ]
    images = torch.cat(parts)
    config.picture.parent.mkdir(parents=True, exist_ok=True)
    save_grid(config.picture, {f"guidance {config.guidance_scale:g}": images}, [caption(a) for a in ANIMALS], 16)

    masks, kinds = load_masks("test")
    rows = torch.cat([(kinds == i).nonzero()[: config.samples, 0] for i in range(len(ANIMALS))])
    data = tint(masks[rows], torch.Generator().manual_seed(0))
    classifier = load_classifier("evaluation")
    with torch.no_grad():
        return {
            "accuracy": (classifier(images).argmax(1) == labels).float().mean().item(),
            "accuracy_data": (classifier(data).argmax(1) == kinds[rows]).float().mean().item(),
            "hue_entropy": hue_entropy(mean_hue(images), labels),
            "hue_entropy_data": hue_entropy(mean_hue(data), kinds[rows]),
        }


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    console = command_console()
    quiet_libraries()
    config = tyro.cli(ReportConfig, args=arguments, prog="python -m fastnabla.testbed")
    try:
        require_single_process()
        measures = report(config)
    except (OSError, ValueError) as error:
        print_error(error)
        return 2
    for name, value in measures.items():
        console.print(f"{name}: {value:.3f}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
