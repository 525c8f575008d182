"""A pipeline whose parts do not fit each other is refused before its weights are loaded, and all misfits are named."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.description import Description
from fastnabla.models.families import SD
from fastnabla.models.fitting import checked_description
from fastnabla.models.image_size import image_size, latent_shape, size_problems
from fastnabla.models.pipeline import encode_prompts, pipeline_of
from tests.families import save_tiny

CONFIG = {part: "tokenizer_config.json" for part in ("tokenizer", "tokenizer_2")}
CONFIG["scheduler"] = "scheduler_config.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines without their weights, by family."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("sd15", "sdxl"):
        save_tiny(family, folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def changed(folders: Path, family: str, folder: Path, changes: dict[str, object]) -> ModelConfig:
    """A copy of a pipeline with other values in its configurations, by PART.NAME or by name in model_index.json. None removes
    an entry."""
    for path in (folders / family).rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(folders)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    for field, value in changes.items():
        part, _, name = field.rpartition(".")
        path = folder / family / part / (CONFIG.get(part, "config.json") if part else "model_index.json")
        values = {**json.loads(path.read_text()), name: value}
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return ModelConfig(name=str(folder / family), dtype="float32")


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("sd15", {"unet.in_channels": 9}, ["unet.in_channels = 9: ", "inpainting"]),
        ("sd15", {"unet.in_channels": 8}, ["unet.in_channels = 8: ", "image-editing"]),
        ("sd15", {"unet.in_channels": 7}, ["unet.in_channels = 7: "]),
        ("sd15", {"unet.out_channels": 8}, ["unet.out_channels = 8: "]),
        ("sd15", {"vae.latent_channels": 16}, ["vae.latent_channels = 16: "]),
        ("sd15", {"vae.out_channels": 4}, ["vae.out_channels = 4: "]),
        ("sd15", {"vae.up_block_types": ["UpDecoderBlock2D"]}, ["vae.up_block_types = ", "must have 2 blocks"]),
        ("sd15", {"unet.encoder_hid_dim": 24}, ["unet.encoder_hid_dim = 24: must be text_encoder.hidden_size = 16"]),
        ("sd15", {"unet.cross_attention_dim": 24}, ["unet.cross_attention_dim = 24: ", "text_encoder.hidden_size = 16"]),
        ("sd15", {"unet.cross_attention_dim": [16, 8]}, ["unet.cross_attention_dim = [16, 8]: "]),
        ("sd15", {"unet.num_class_embeds": 10}, ["unet.num_class_embeds = 10: "]),
        ("sd15", {"unet.class_embed_type": "projection"}, ["unet.class_embed_type = 'projection': "]),
        ("sd15", {"unet.addition_embed_type": "text_time"}, ["unet.addition_embed_type = 'text_time': "]),
        ("sd15", {"unet.sample_size": None}, ["unet.sample_size = None: ", "--model.height", "--model.width"]),
        ("sd15", {"unet.sample_size": [8]}, ["unet.sample_size = [8]: "]),
        ("sd15", {"unet.sample_size": [9, 12]}, ["unet.sample_size = [9, 12], a height of 18 pixels", "16 and 24"]),
        ("sd15", {"tokenizer.model_max_length": 512}, ["tokenizer.model_max_length = 512: ", "77 positions"]),
        ("sd15", {"text_encoder.vocab_size": 300}, ["text_encoder.vocab_size = 300: "]),
        ("sd15", {"vae": ["diffusers", "AutoencoderTiny"]}, ["vae = AutoencoderTiny: ", "--model.tiny-decoder"]),
        ("sd15", {"tokenizer": [None, None], "scheduler": None}, ["has no tokenizer, scheduler: "]),
        ("sd15", {"scheduler": ["diffusers", "NewScheduler"]}, ["scheduler = NewScheduler: must be a scheduler of diffusers"]),
        ("sd15", {"text_encoder.hidden_size": "16"}, ["cannot be loaded", "expected int", "all files of a diffusers pipeline"]),
        ("sdxl", {"unet.projection_class_embeddings_input_dim": 5 * 4 + 12}, ["five size conditions"]),
        ("sdxl", {"unet.projection_class_embeddings_input_dim": 6 * 4 + 16}, ["= 40: must be", "6 · 4 + 12 = 36"]),
        ("sdxl", {"unet.addition_embed_type": None}, ["unet.addition_embed_type = None: must be 'text_time'"]),
        ("sdxl", {"text_encoder_2.projection_dim": 20}, ["text_encoder_2.projection_dim = 6 · 4 + 20"]),
        ("sdxl", {"text_encoder_2.hidden_size": 32}, ["unet.cross_attention_dim = 40: ", "16 + 32 = 48"]),
        ("sdxl", {"text_encoder": [None, None]}, ["has no text_encoder: "]),
        ("sdxl", {"tokenizer_2.model_max_length": 64}, ["tokenizer_2.model_max_length = 64: must be equal"]),
        (
            "sdxl",
            {"unet.in_channels": 9, "unet.class_embed_type": "timestep", "unet.sample_size": None, "vae.out_channels": 1,
             "text_encoder.hidden_size": 8},
            ["(1) unet.in_channels", "(2) unet.class_embed_type", "(3) unet.cross_attention_dim", "(4) vae.out_channels",
             "(5) unet.sample_size"],
        ),
    ],
)  # fmt: skip
def test_misfits_are_refused_by_name(
    folders: Path, tmp_path: Path, family: str, changes: dict, named: list[str]
) -> None:
    model = changed(folders, family, tmp_path, changes)
    with pytest.raises(ValueError) as refusal:
        checked_description(model)
    message = str(refusal.value)
    assert message.startswith(f"model.name = {model.name!r}: ")
    assert all(name in message for name in named), message
    assert message.count("; (") == sum(name.startswith("(") for name in named[1:]), "one change is one misfit"


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"unet.sample_size": [8, 12]},
        {"tokenizer.model_max_length": None},
        {"tokenizer.model_max_length": 64, "tokenizer_2.model_max_length": 64},
    ],
)
def test_parts_that_fit(folders: Path, tmp_path: Path, family: str, changes: dict) -> None:
    model = changed(folders, family, tmp_path, {f: v for f, v in changes.items() if family == "sdxl" or "_2" not in f})
    description = checked_description(model)
    unet, vae = description.network, description.vae
    assert unet["in_channels"] == vae["latent_channels"] == 4


@pytest.mark.parametrize(("family", "part"), [("sd15", "tokenizer"), ("sdxl", "tokenizer_2")])
def test_a_tokenizer_without_its_files_is_refused(folders: Path, tmp_path: Path, family: str, part: str) -> None:
    """transformers makes one for which every word is unknown."""
    model = changed(folders, family, tmp_path, {})
    shutil.rmtree(tmp_path / family / part)
    with pytest.raises(ValueError, match=rf"model\.name = .*: {part}\.vocab: has no words; .* lacks tokenizer\.json"):
        checked_description(model)


def test_an_old_configuration_has_the_size_that_diffusers_gives_it(folders: Path, tmp_path: Path) -> None:
    model = changed(folders, "sd15", tmp_path, {"unet._diffusers_version": "0.6.0"})
    assert image_size(model, checked_description(model)) == (128, 128)


def test_a_size_must_be_a_multiple_and_the_nearest_ones_are_named() -> None:
    def refused(**sides: int) -> str:
        with pytest.raises(ValueError, match=r"model\.name = 'sd15-small': .*must be a multiple of 64") as refusal:
            checked_description(ModelConfig(name="sd15-small", random_init=True, **sides))
        return str(refusal.value)

    assert "model.height = 500: " in refused(height=500) and "448 and 512" in refused(height=500)
    assert "(1) model.height = 8" in (both := refused(height=8, width=1000)) and "(2) model.width = 1000" in both
    assert "nearest for --model.height is 64" in both and "960 and 1024" in both
    with pytest.raises(ValueError, match=r"model\.width = 0"):
        ModelConfig(width=0)


def test_sizes() -> None:
    unet, vae = {"sample_size": [8, 12], "in_channels": 4}, {"block_out_channels": (8, 8)}
    model = Description(family=SD, network=unet, vae=vae, lengths=SD.text_lengths)
    assert image_size(ModelConfig(), model) == (16, 24)
    assert image_size(ModelConfig(height=32), model) == (32, 24)
    assert latent_shape(ModelConfig(height=32, width=8), model) == (4, 16, 4)
    absent = dataclasses.replace(model, network={"sample_size": None, "block_out_channels": (8, 16)})
    assert size_problems(ModelConfig(height=16), absent)
    assert not size_problems(ModelConfig(height=16, width=24), absent)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"latent_channels": 16}, "it has 16 latent channels and the VAE 4"),
        ({"num_decoder_blocks": (1, 1, 1)}, "it has 4 pixels per latent and the VAE 2"),
    ],
)
def test_a_tiny_decoder_must_be_of_the_vae(folders: Path, tmp_path: Path, changes: dict, named: str) -> None:
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    tiny = tmp_path / "tiny"
    AutoencoderTiny(**blocks, **counts).save_pretrained(tiny)
    model = ModelConfig(name=str(folders / "sd15"), tiny_decoder=str(tiny))
    checked_description(model)
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError) as refusal:
        checked_description(model)
    assert f"model.tiny_decoder = {str(tiny)!r}: {named}; use the one made for this VAE" in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_a_tokenizer_without_a_limit_has_that_of_its_encoder(family: str, tmp_path: Path) -> None:
    model = ModelConfig(name=save_tiny(family, tmp_path), dtype="float32")
    expected = encode_prompts(pipeline_of(model), ["a cat"])
    for path in (tmp_path / family).glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(path.read_text())
        assert config.pop("model_max_length") in (77, 256, 512)
        path.write_text(json.dumps(config))
    conditions = encode_prompts(pipeline_of(model), ["a cat"])
    assert torch.equal(conditions.text, expected.text) and torch.equal(conditions.pooled, expected.pooled)
