"""The embedded testbed: a small text-to-image diffusion model, its data and its training script."""

from importlib.resources import files
from pathlib import Path


def pipeline_folder() -> Path:
    """Folder of the shipped, trained pipeline, for `StableDiffusionPipeline.from_pretrained`."""
    return Path(str(files("fastnabla.testbed") / "data/pipeline"))
