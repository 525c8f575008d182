"""`python -m fastnabla.testbed [--folder DIR] [--guidance-scale W]`: measure the quality of the testbed's model.

From 500 samples with plain diffusers: the fraction that the evaluation classifier assigns to the prompt's animal, and the
entropy of their hues, compared with as many tinted silhouettes from the test split.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import tyro
from diffusers import StableDiffusionPipeline

from fastnabla.distributed.launch import require_single_process
from fastnabla.metrics.diversity import hue_entropy, mean_hue
from fastnabla.run.pictures import save_grid
from fastnabla.testbed import pipeline_folder
from fastnabla.testbed.classifier import load_classifier
from fastnabla.testbed.silhouettes import ANIMALS, caption, load_masks, tint
from fastnabla.utils.console import command_console, print_error, quiet_libraries


@dataclasses.dataclass(kw_only=True, slots=True)
class ReportConfig:
    """Measure the testbed's pretrained pipeline."""

    folder: Path = dataclasses.field(default_factory=pipeline_folder)
    """Pipeline folder. Default: the shipped one."""
    samples: int = 50
    """Samples per animal."""
    steps: int = 20
    """DDIM steps, with η = 1."""
    guidance_scale: float = 3.0
    """Scale w of classifier-free guidance."""
    picture: Path = Path("runs/testbed.png")
    """PNG file for the grid of samples."""


def report(config: ReportConfig) -> dict[str, float]:
    """Sample, write the grid and return the measures by name."""
    pipe = StableDiffusionPipeline.from_pretrained(config.folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(len(ANIMALS)).repeat_interleave(config.samples)
    parts = []
    for part in labels.split(100):
        prompts = [caption(ANIMALS[i]) for i in part.tolist()]
        generator = torch.Generator().manual_seed(len(parts))
        parts.append(
            pipe(
                prompts,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance_scale,
                eta=1.0,
                generator=generator,
                output_type="pt",
            ).images.float()
        )
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
    except ValueError as error:
        print_error(error)
        return 2
    for name, value in report(config).items():
        console.print(f"{name}: {value:.3f}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
