"""A tiny pipeline and its folder, for tests of what is read from a model's files."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from fastnabla.models.random_init import random_pipeline
from tests.families import TINY


@pytest.fixture(scope="module")
def pipeline() -> DiffusionPipeline:
    return random_pipeline(TINY["sd15"], {"default": torch.float32})


@pytest.fixture(scope="module")
def saved(pipeline: DiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "m"
    pipeline.save_pretrained(folder)
    return folder
