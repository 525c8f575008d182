"""What checkpoints come as: variants of weight files, single files, damaged files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from fastnabla.config.model_sections import ModelConfig
from fastnabla.config.train import TrainConfig
from fastnabla.cost.shapes import shapes_of
from fastnabla.models.description import described
from fastnabla.models.model_source import CONFIGURATIONS, single_file_of, source_of
from fastnabla.models.pipeline import pipeline_of
from fastnabla.models.random_init import random_pipeline
from fastnabla.models.weight_files import variant_to_load
from tests.families import TINY
from tests.single_file import save_single_file


@pytest.fixture(scope="module")
def pipeline() -> DiffusionPipeline:
    return random_pipeline(TINY["sd15"], {"default": torch.float32})


@pytest.fixture(scope="module")
def saved(pipeline: DiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline as full/ and as half/, which has fp16 files only, and as a single file."""
    folder = tmp_path_factory.mktemp("my models")
    pipeline.save_pretrained(folder / "full")
    pipeline.save_pretrained(folder / "half", variant="fp16")
    (folder / "single").mkdir()
    save_single_file(pipeline, folder / "single" / "cute.safetensors")
    return folder


def config_of(name: Path | str, **settings) -> ModelConfig:
    return ModelConfig(name=str(name), dtype="float32", **settings)


def assert_same_weights(found: DiffusionPipeline, expected: DiffusionPipeline) -> None:
    for part in ("unet", "vae", "text_encoder"):
        theirs, ours = (getattr(each, part).state_dict() for each in (expected, found))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(weight, ours[name]) for name, weight in theirs.items()), part


@pytest.mark.slow
def test_a_folder_with_one_variant_is_loaded_and_said_so(
    saved: Path, pipeline: DiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    assert_same_weights(pipeline_of(config_of(saved / "half")), pipeline)
    assert "has only weights of the variant fp16, which is loaded" in caplog.text
    caplog.clear()
    assert_same_weights(pipeline_of(config_of(saved / "half", variant="fp16")), pipeline)
    assert_same_weights(pipeline_of(config_of(saved / "full")), pipeline)
    assert not caplog.records


def test_parts_that_transformers_has_dropped_are_not_loaded(
    saved: Path, pipeline: DiffusionPipeline, tmp_path: Path
) -> None:
    """Pipelines of 2022 have a CLIPFeatureExtractor, for their safety checker."""
    model = shutil.copytree(saved / "full", tmp_path / "m")
    index = json.loads((model / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (model / "model_index.json").write_text(json.dumps(index))
    assert_same_weights(pipeline_of(config_of(model)), pipeline)


def test_variants(saved: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"

    def files(*names: str) -> None:
        shutil.rmtree(model, ignore_errors=True)
        for name in names:
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            save_file({"a": torch.zeros(1)}, model / name)

    def variant(given: str | None = None) -> str | None:
        return variant_to_load(config_of(model, variant=given))

    unet, vae = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"
    files(f"{unet}.fp16.safetensors", f"{vae}.safetensors")
    assert variant() == variant("fp16") == "fp16"
    files(f"{unet}-00001-of-00002.fp16.safetensors", f"{unet}.fp16-00002-of-00002.safetensors")
    assert variant() == "fp16"
    files(f"{unet}.safetensors", f"{unet}.fp16.safetensors", f"{unet}.ema_only.safetensors")
    assert (variant(), variant("ema_only")) == (None, "ema_only")
    files(f"{unet}.fp16.safetensors", f"{unet}.bf16.safetensors")
    with pytest.raises(ValueError, match=r"variants bf16, fp16 only\. Choose one with --model\.variant"):
        variant()
    files(f"{unet}.fp16.safetensors", f"{vae}.bf16.safetensors")
    with pytest.raises(
        ValueError, match=r"no variant .* for all parts \(unet: fp16; vae: bf16\)\. Download one that is"
    ):
        variant()
    files(f"{unet}.fp16.safetensors", f"{unet}.bf16.safetensors")
    with pytest.raises(ValueError, match=r"model\.variant = 'fp8': no part of model\.name .*There are bf16, fp16"):
        variant("fp8")
    with pytest.raises(ValueError, match=r"model\.variant = 'fp16': no part .* It has no variants\. Leave it out"):
        pipeline_of(config_of(saved / "full", variant="fp16"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single/cute.safetensors", "single"], ids=["file", "folder"])
def test_a_single_file_is_loaded(saved: Path, pipeline: DiffusionPipeline, name: str) -> None:
    """The images of the single file are those of the folder: same weights, tokenizer and scheduler."""
    config = config_of(saved / name, config=str(saved / "full"))
    found = pipeline_of(config)
    assert_same_weights(found, pipeline)
    assert found.scheduler.config.beta_schedule == "scaled_linear" and not found.unet.training
    description = described(config)
    unet, vae = description.network, description.vae
    assert unet["block_out_channels"] == [8, 16] and vae["block_out_channels"] == [8, 8]
    assert shapes_of(TrainConfig(model=config)).sample_shape == (4, 8, 8)
    half = pipeline_of(ModelConfig(name=config.name, config=config.config, dtype="float16", vae_dtype="float32"))
    assert [part.dtype for part in (half.unet, half.text_encoder, half.vae)] == [torch.float16] * 2 + [torch.float32]


def test_the_configuration_of_a_single_file_is_recognised(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved / "single" / "cute.safetensors"
    assert source_of(config_of(file)) == CONFIGURATIONS["v1"]
    monkeypatch.setenv("HOME", str(saved / "single"))
    assert single_file_of(config_of("~/cute.safetensors")) == file
    parts = [f"{prefix}.weight" for prefix in ("model.diffusion_model", "first_stage_model", "conditioner.embedders.0")]
    for keys, kind in (
        ({"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1,)}, "xl_base"),
        ({"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (1, 1024)}, "v2"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (1, 9, 3, 3)}, "inpainting"),
    ):
        model = config_of(tmp_path / f"{kind}.safetensors")
        save_file({name: torch.zeros(keys.get(name, (1,))) for name in (*parts, *keys)}, model.name)
        if kind in CONFIGURATIONS:
            assert source_of(model) == CONFIGURATIONS[kind]
        else:
            with pytest.raises(ValueError, match=rf"'{kind}', whose tensors do not tell .*--model\.config"):
                source_of(model)


def test_without_its_configuration_a_single_file_names_the_remedy(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGURATIONS, "v1", "no-such-owner/no-such-model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"hf download no-such-owner/no-such-model --include .* or give --model\.config: "
    ):
        pipeline_of(config_of(saved / "single"))
    with pytest.raises(ValueError, match=r"model\.config = 'x': is the configuration of a single .*leave it out"):
        pipeline_of(config_of(saved / "full", config="x"))
    with pytest.raises(ValueError, match=r"model\.config = 'v1\.yaml': is a file; must be the folder or Hub id"):
        pipeline_of(config_of(saved / "single", config="v1.yaml"))
    with pytest.raises(ValueError, match=r"model\.config = 'x': is for a \.safetensors file"):
        config_of("testbed", config="x")


@pytest.mark.slow
def test_a_single_file_that_does_not_fit_is_refused(pipeline: DiffusionPipeline, saved: Path, tmp_path: Path) -> None:
    random_pipeline(TINY["sdxl"], {"default": torch.float32}).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"cute\.safetensors does not fit the configuration .*other'.*Give another --model\.config"
    ):
        pipeline_of(config_of(saved / "single", config=str(tmp_path / "other")))
    tensors, told = load_file(saved / "single" / "cute.safetensors"), tmp_path / "told.safetensors"
    config = config_of(told, config=str(saved / "full"))
    save_file(tensors, told, {"modelspec.prediction_type": "epsilon"})
    assert_same_weights(pipeline_of(config), pipeline)
    for marks, metadata, said in (
        ((), {"modelspec.prediction_type": "v"}, "prediction_type = 'v_prediction', .* has 'epsilon'"),
        (("v_pred",), None, "prediction_type = 'v_prediction', .* has 'epsilon'"),
        (("ztsnr",), None, "rescale_betas_zero_snr = True, .* has False"),
    ):
        save_file(tensors | {name: torch.zeros(0) for name in marks}, told, metadata)
        with pytest.raises(ValueError, match=rf"trained for {said}"):
            pipeline_of(config)
    for lacking in (".out.2.bias", ".decoder.conv_out.bias", ".final_layer_norm.bias"):
        save_file({name: w for name, w in tensors.items() if not name.endswith(lacking)}, tmp_path / "cut.safetensors")
        with pytest.raises(ValueError, match=r"cut\.safetensors does not fit .*it lacks"):
            pipeline_of(config_of(tmp_path / "cut.safetensors", config=str(saved / "full")))
    half = ModelConfig(name=str(tmp_path / "cut.safetensors"), config=str(saved / "full"), dtype="float16")
    with pytest.raises(ValueError, match=r"cut\.safetensors does not fit .*it lacks"):
        pipeline_of(half)


def test_other_files_are_refused_with_a_remedy(saved: Path, tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(ValueError, match=rf"model\.name = .*{message}"):
            pipeline_of(config_of(tmp_path / name))

    refused("missing.safetensors", r"no such file.*hf download OWNER/NAME missing\.safetensors")
    (tmp_path / "it's.ckpt").write_bytes(b"")
    refused("it's.ckpt", r"is a pickle.*python -c .*from_single_file.*save_pretrained")
    refused("", r"is a pickle")  # the folder with nothing else
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused("lfs.safetensors", "git lfs pull")
    (tmp_path / "cut.safetensors").write_bytes((saved / "single" / "cute.safetensors").read_bytes()[:1000])
    refused("cut.safetensors", r"of 1000 bytes, is not a valid \.safetensors file.*Download it again")
    refused("", r"several checkpoints: cut\.safetensors, lfs\.safetensors")
    save_file({"lora_unet_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    refused("lora.safetensors", r"has no UNet, VAE, text encoder .*It may be a LoRA")
    shutil.copytree(saved / "full", tmp_path / "broken")
    (tmp_path / "broken/text_encoder/model.safetensors").write_bytes(b"<html>")
    refused("broken", r"text_encoder/model\.safetensors', of 6 bytes, is not a valid")


@pytest.mark.parametrize(
    ("part", "file", "name"),
    [
        ("unet", "diffusion_pytorch_model", "conv_out.bias"),
        ("vae", "diffusion_pytorch_model", "decoder.conv_out.bias"),
        ("text_encoder", "model", "final_layer_norm.bias"),
    ],
)
def test_a_folder_that_lacks_weights_is_refused(saved: Path, tmp_path: Path, part: str, file: str, name: str) -> None:
    """diffusers and transformers load such a folder with a warning, and random or no values for the missing weights."""
    shutil.copytree(saved / "full", tmp_path / "m")
    path = tmp_path / "m" / part / f"{file}.safetensors"
    tensors = load_file(path)
    (lacking,) = (key for key in tensors if key.endswith(name))
    del tensors[lacking]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part}/ lacks 1 weights, such as \S*{name}\. .*Download them again"):
        pipeline_of(config_of(tmp_path / "m"))
