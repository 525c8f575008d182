"""Where a pretrained model is: a diffusers pipeline (a folder or a Hub id), or one .safetensors file with all weights."""

import os
import shlex
from pathlib import Path

from diffusers.loaders.single_file_utils import infer_diffusers_model_type

from fastnabla.config.model_sections import TESTBED, TESTBEDS, ModelConfig
from fastnabla.models.safetensors_header import SafetensorsHeader
from fastnabla.testbed import flow_pipeline_folder, pipeline_folder

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
CONFIGURATION_FILES = (".yaml", ".yml", ".json")
"""Ends of the names of files that describe a single file elsewhere."""
PARTS = {
    "UNet": ("model.diffusion_model.",),
    "VAE": ("first_stage_model.",),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
}
"""Prefixes of a part's tensors in a single file, the layout of the original implementation."""
CONFIGURATIONS = {
    "v1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "xl_base": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""diffusers' type of a single file → Hub id of the pipeline with its configuration."""


def source_of(model: ModelConfig) -> str | Path:
    """Folder or Hub id of the pipeline whose configuration files describe `model`.

    Raises:
        ValueError: as `single_file_of`, a single file does not tell what its configuration is, or `model.config` is a file.
    """
    if model.name in TESTBEDS:
        return pipeline_folder() if model.name == TESTBED else flow_pipeline_folder()
    file = single_file_of(model)
    if file is None:
        return os.path.expanduser(model.name)
    header = _whole_checkpoint(model, file)
    if model.config is None:
        return _configuration_of(model, file, header)
    config = os.path.expanduser(model.config)
    if Path(config).is_file() or config.endswith(CONFIGURATION_FILES):
        raise ValueError(
            f"model.config = {model.config!r}: is a file; must be the folder or Hub id of a diffusers pipeline, whose .json and "
            ".txt files are enough."
        )
    return config


def single_file_of(model: ModelConfig) -> Path | None:
    """The .safetensors file that `model.name` is, or that is alone in that folder; None for a pipeline or a Hub id.

    Raises:
        ValueError: the file does not exist, is of another format, or a folder has several.
    """
    if model.name in TESTBEDS or model.random_init:
        return None
    path = Path(os.path.expanduser(model.name))  # unlike Path.expanduser, leaves an unknown user as it is
    if path.is_dir():
        path = _file_in(model, path)
    elif path.suffix.lower() not in (".safetensors", *PICKLED):
        path = None
    if path is None:
        if model.config is not None:
            raise ValueError(
                f"model.config = {model.config!r}: is the configuration of a single .safetensors file, and model.name = "
                f"{model.name!r} is not one; leave it out."
            )
        return None
    if not path.is_file():
        raise ValueError(
            f"model.name = {model.name!r}: there is no such file. To download one from the Hub: hf download OWNER/NAME "
            f"{shlex.quote(path.name)} --local-dir ."
        )
    if path.suffix.lower() in PICKLED:
        raise ValueError(
            f"model.name = {model.name!r}: {path.name} is a pickle, which can run any code when it is loaded. If you trust it, "
            f"convert it once: {conversion(path)}"
        )
    return path


def remedy(model: ModelConfig) -> str:
    """What to do if `model` cannot be loaded."""
    if model.name in TESTBEDS or (file := single_file_of(model)) is None:
        if os.path.isdir(os.path.expanduser(model.name)):
            return "Give a folder with all files of a diffusers pipeline, as its save_pretrained writes them."
        return (
            "Give a local folder with a model_index.json, a .safetensors file, 'testbed', or a Hub id downloaded with: "
            f"hf download {model.name}"
        )
    source = source_of(model)
    if Path(source).is_dir():
        return "Give another --model.config: the folder of a diffusers pipeline with the same architecture."
    return (
        f"Its configuration files are those of {source!r}. Download them with: hf download {source} --include '*.json' '*.txt'; "
        f"or give --model.config: the folder of a diffusers pipeline with the architecture of {file.name}."
    )


def conversion(file: Path) -> str:
    """The command that converts a single file into a folder with a diffusers pipeline."""
    program = (
        "from diffusers import StableDiffusionPipeline as P; "
        f"P.from_single_file({str(file)!r}).save_pretrained({str(file.with_suffix(''))!r})"
    )
    return f"python -c {shlex.quote(program)} (StableDiffusionXLPipeline for XL)"


def _file_in(model: ModelConfig, folder: Path) -> Path | None:
    if (folder / "model_index.json").exists() or (folder / "unet").is_dir():
        return None
    for suffixes in ((".safetensors",), PICKLED):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
        if len(files) > 1:
            raise ValueError(
                f"model.name = {model.name!r}: the folder has no model_index.json, but several checkpoints: "
                f"{', '.join(path.name for path in files[:5])}. Give the path of one of them."
            )
        if files:
            return files[0]
    return None


def _whole_checkpoint(model: ModelConfig, file: Path) -> SafetensorsHeader:
    """The header of a single file that has all parts of a pipeline."""
    header = SafetensorsHeader.of(file, f"model.name = {model.name!r}")
    missing = [part for part, prefixes in PARTS.items() if not any(name.startswith(prefixes) for name in header.shapes)]
    if missing:
        raise ValueError(
            f"model.name = {model.name!r}: {file.name} has no {', '.join(missing)} in the layout of Stable Diffusion's original "
            "implementation, so it is not a whole checkpoint. It may be a LoRA or one part of a pipeline. Give a whole "
            "checkpoint, or the folder of a diffusers pipeline."
        )
    return header


def _configuration_of(model: ModelConfig, file: Path, header: SafetensorsHeader) -> str:
    """Hub id of the configuration of a single file, recognised by its tensors."""
    kind = infer_diffusers_model_type(header.meta_tensors())
    if kind not in CONFIGURATIONS:
        version = "whether it predicts ε or v" if kind == "v2" else "a configuration that can be finetuned"
        raise ValueError(
            f"model.name = {model.name!r}: {file.name} is of the type {kind!r}, whose tensors do not tell {version}. Give "
            "--model.config: a folder or Hub id of a diffusers pipeline of Stable Diffusion with the same architecture."
        )
    return CONFIGURATIONS[kind]
