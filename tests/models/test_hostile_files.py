"""Weights from somebody else: whatever the files say of themselves, they are refused by name, and nothing in them is run."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, StableDiffusionPipeline

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.fitting import checked_description
from fastnabla.models.kohya import save_kohya
from fastnabla.models.pipeline import pipeline_of
from fastnabla.models.saved_policy import LORA_FILE, load_policy
from fastnabla.models.tiny_decoder import load_tiny_decoder
from fastnabla.models.weight_files import variant_to_load
from fastnabla.rewards.weights import read_state_dict
from fastnabla.run.large_tensors import read_tensors, write_tensors
from tests.lies import LIES

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "m")


def load(model: Path) -> DiffusionPipeline:
    return pipeline_of(ModelConfig(name=str(model), dtype="float32"))


def large(file: Path) -> None:
    write_tensors(file.parent / "large", {"a": torch.zeros(2)})
    shutil.copy(file, file.parent / "large")
    read_tensors(file.parent / "large", {"a": torch.ones(2)})


READERS: dict[str, Callable[[Path, DiffusionPipeline], object]] = {
    f"run/lora/{LORA_FILE}": lambda file, pipeline: load_policy(pipeline, file.parents[1]),
    f"kohya/lora/{LORA_FILE}": lambda file, pipeline: save_kohya(file.parents[1], file.parent / "out.safetensors"),
    "single.safetensors": lambda file, pipeline: load(file),
    "m/unet/diffusion_pytorch_model.safetensors": lambda file, pipeline: variant_to_load(
        ModelConfig(name=str(file.parents[1]))
    ),
    "reward.safetensors": lambda file, pipeline: read_state_dict("x", file),
    "tiny/diffusion_pytorch_model.safetensors": lambda file, pipeline: load_tiny_decoder(
        str(file.parent), torch.float32
    ),
    "checkpoint.safetensors": lambda file, pipeline: large(file),
}


@pytest.mark.parametrize("place", READERS)
def test_a_header_that_lies_is_refused(place: str, pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    if place.startswith("tiny"):
        AutoencoderTiny(encoder_block_out_channels=[4] * 4, decoder_block_out_channels=[4] * 4).save_config(file.parent)
    for lie, content in LIES.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"\S") as refused:
            READERS[place](file, pipeline)
        message = str(refused.value)
        assert file.name in message and "\n" not in message and len(message) < 1000, (lie, message)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors.*not a regular file"):
        read_state_dict("x", tmp_path / "w.safetensors")


def split(model: Path, part: str, shards: list[str], **changes: str) -> Path:
    """Give the weights of a part an index with these files, of which the first has all tensors."""
    (weights,) = (model / part).glob("*.safetensors")
    index = {"metadata": {}, "weight_map": dict(zip(("a", "b"), shards, strict=False))}
    path = weights.with_name(f"{weights.name}.index.json")
    path.write_text(json.dumps(index | changes))
    return weights


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_index_that_names_files_elsewhere_is_refused(part: str, model: Path) -> None:
    elsewhere = model.parent / "elsewhere.safetensors"
    shutil.copy(model / UNET, elsewhere)
    for name in ("../../elsewhere.safetensors", str(elsewhere), "..", "", "a\0b"):
        split(model, part, [name])
        with pytest.raises(ValueError, match=r"model\.name = .*index\.json' names .*must be a file of its own folder"):
            load(model)
    split(model, part, ["model-00001-of-00002.safetensors"])
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors' is missing; .*index\.json names it"):
        load(model)
    for wrong in ({"weight_map": []}, {"weight_map": {"a": 1}}, {"metadata": "x"}):
        split(model, part, ["a"], **wrong)
        with pytest.raises(ValueError, match=r"index\.json' cannot be read .*must be an object"):
            load(model)


def test_links_of_the_hub_s_cache_are_followed(model: Path) -> None:
    """A snapshot's files are links to ../../blobs."""
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(path for path in sorted(model.rglob("*")) if path.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    load(model)


def test_a_download_is_checked_before_it_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only configuration files are in the hub's cache before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")

    def download(name: str, **options: object) -> str:
        assert (name, options["variant"], options["use_safetensors"]) == ("some/model", None, True)
        shutil.copytree(model, snapshot, dirs_exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr(StableDiffusionPipeline, "download", download)
    config = ModelConfig(name="some/model", dtype="float32")
    pipeline_of(config)
    (snapshot / UNET).unlink()
    (model / UNET).write_bytes(next(iter(LIES.values())))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        patch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("it is loaded"))
        pipeline_of(config)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


def test_pickled_weights_are_refused_and_not_run(pipeline: DiffusionPipeline, model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "run"
    evil = pickle.dumps(Evil(trace))
    (model / UNET).unlink()
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "x.pt", "x.ckpt"):
        path = model / "unet" / name
        path.write_bytes(evil)
        with pytest.raises(ValueError, match=rf"unet/{name} is a pickle, .*Use a copy with \.safetensors files"):
            load(model)
        path.unlink()
    for place in ("lora/pytorch_lora_weights.bin", "tiny/diffusion_pytorch_model.bin", "r.pt", "unet/diffusion.bin"):
        path = tmp_path / "weights" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(evil)
    AutoencoderTiny().save_config(tmp_path / "weights" / "tiny")
    shutil.copy(model / "unet" / "config.json", tmp_path / "weights" / "unet")
    weights = tmp_path / "weights"
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors"):
        load_policy(pipeline, weights)
    shutil.rmtree(weights / "lora")
    with pytest.raises(ValueError, match="do not fit its configuration"):
        load_policy(pipeline, weights)
    with pytest.raises(ValueError, match=r"model\.tiny_decoder = "):
        load_tiny_decoder(str(weights / "tiny"), torch.float32)
    with pytest.raises(ValueError, match=r"r\.pt cannot be read"):
        read_state_dict("x", weights / "r.pt")
    assert not trace.exists()
    pickle.loads(evil)
    assert trace.exists()


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("unet", ["evil", "UNet2DConditionModel"]),
        ("vae", ["os", "AutoencoderKL"]),
        ("tokenizer", ["evil", "CLIPTokenizer"]),
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("scheduler", ["diffusers", "DiffusionPipeline"]),
        ("text_encoder", 5),
        ("scheduler", ["diffusers"]),
    ],
)
def test_code_that_comes_with_a_model_is_not_run(
    part: str, entry: object, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not from the folder of the part, the model, or the one that Python started in."""
    for folder in (model / part, model, model.parent):
        (folder / "evil.py").write_text("print('evil runs')\n")
    monkeypatch.chdir(model.parent)
    monkeypatch.syspath_prepend(str(model.parent))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {part: entry}))
    with pytest.raises(ValueError, match=rf"model\.name = .*{part} = .*must be"):
        checked_description(ModelConfig(name=str(model)))
    assert "evil runs" not in "".join(capfd.readouterr())
