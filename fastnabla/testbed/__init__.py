"""The embedded testbed: a small text-to-image diffusion model, its data, and how it was trained."""

from importlib.resources import files
from pathlib import Path


def pipeline_folder() -> Path:
    """The shipped, trained pipeline, as `StableDiffusionPipeline.from_pretrained` takes it."""
    return Path(str(files("fastnabla.testbed") / "data/pipeline"))
