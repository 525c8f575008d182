"""The embedded testbed: two small text-to-image models, a diffusion and a flow model, their data and training script."""

from importlib.resources import files
from pathlib import Path


def pipeline_folder() -> Path:
    """Folder of the shipped, trained pipeline, for `StableDiffusionPipeline.from_pretrained`."""
    return Path(str(files("fastnabla.testbed") / "data/pipeline"))


def flow_pipeline_folder() -> Path:
    """Folder of the shipped, trained flow-matching pipeline, for `StableDiffusion3Pipeline.from_pretrained`.

    Its VAE is a link to that of `pipeline_folder()`. Its prompts have 16 tokens: call the pipeline, or its `encode_prompt`,
    with ``max_sequence_length=16``.
    """
    return Path(str(files("fastnabla.testbed") / "data/pipeline_flow"))
