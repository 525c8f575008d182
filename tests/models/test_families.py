"""Every family with a UNet trains, is saved, and is loaded again by plain diffusers. Those of flow models: `test_flow_families.py`."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from fastnabla.config.model_sections import ModelConfig, RewardConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import ComputeConfig, EvaluationConfig, MemoryConfig, RolloutConfig
from fastnabla.cost.shapes import shapes_of
from fastnabla.models.build import build_networks
from fastnabla.models.description import Description
from fastnabla.models.families import SD, SDXL, Family
from fastnabla.models.pipeline import encode_prompts, pipeline_of
from fastnabla.models.sampler import use_sampler
from fastnabla.prompts import RunPrompts
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.rollout import sample
from tests.families import TRAINED, UNETS, save_tiny
from tests.runs import small, without_pictures

PROMPTS = ["a cat", "a dog"]


def config_of(model: str, **changes) -> TrainConfig:
    settings = {
        "updates": 2,
        "checkpoint_every": 2,
        "model": ModelConfig(name=model, dtype="float32"),
        "reward": RewardConfig(terms=("hue=1",)),
        "rollout": RolloutConfig(trajectories=2, fraction=0.5, updates=2),
        "evaluation": EvaluationConfig(every=2, samples=2, prompts=2),
    }
    return small(**(settings | changes))


@pytest.fixture(scope="module", params=UNETS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(request.param, tmp_path_factory.mktemp("models"))


def plain_images(pipeline: DiffusionPipeline, config: TrainConfig, **size: int) -> torch.Tensor:
    """What diffusers makes of `PROMPTS`, with the sampler of `config`."""
    use_sampler(pipeline, config.sampler)
    return pipeline(
        PROMPTS,
        num_inference_steps=config.sampler.steps,
        guidance_scale=config.sampler.guidance_scale,
        eta=config.sampler.eta,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="pt",
        **size,
    ).images


@pytest.mark.slow
def test_policy_samples_what_plain_diffusers_does(model: str) -> None:
    """The same prompts, conditions, guidance, sampler and noise: to float32 rounding."""
    config = config_of(model)
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    expected = plain_images(pipeline, config)
    prompts = RunPrompts(texts=PROMPTS, trained=2, evaluated=range(2))
    networks = build_networks(pipeline_of(config.model), prompts, config, torch.device("cpu"))
    with networks.policy.pretrained_weights():
        latents = sample(
            networks.policy, networks.table, torch.arange(2), [1, 2], networks.sample_shape, backend="torch"
        )
    torch.testing.assert_close(networks.decoder.decode(latents), expected, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last_is_of_unet_and_decoder(model: str, channels_last: bool) -> None:
    config = config_of(model, compute=ComputeConfig(channels_last=channels_last))
    prompts = RunPrompts(texts=PROMPTS, trained=2, evaluated=range(2))
    networks = build_networks(pipeline_of(config.model), prompts, config, torch.device("cpu"))
    for layer in (networks.policy.network.conv_in, networks.decoder.vae.decoder.conv_in):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "trained"),
    [
        ("sd15", "LoRA on all linear layers"),
        ("sd21", "LoRA"),
        ("sdxl", "LoRA on all linear layers"),
        ("sdxl", "all weights"),
    ],
    indirect=["model"],
)
def test_trained_weights_load_in_plain_diffusers(model: str, trained: str, tmp_path: Path) -> None:
    """A LoRA on all linear layers has those of the default one; SD 2.1's kinds of layers are all in SD 1.5 or XL. All weights
    of SD 1.5 are in `test_sampling_a_run` and `test_ema`."""
    config = config_of(model, lora=TRAINED[trained])
    trainer = without_pictures(Trainer.from_config(config))
    trainer.train(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["update"] for r in records if r["phase"] == "train"] == [1, 2]

    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    before = plain_images(pipeline, config)
    if trained != "all weights":
        assert all(v.dtype == torch.float32 for v in load_file(next((tmp_path / "lora").iterdir())).values())
        pipeline.load_lora_weights(tmp_path / "lora")
    else:
        pipeline.unet = type(pipeline.unet).from_pretrained(tmp_path / "unet")
    loaded = plain_images(pipeline, config)
    pipeline.unet = trainer.policy.network
    torch.testing.assert_close(loaded, plain_images(pipeline, config), rtol=0, atol=1e-6)
    assert (loaded - before).abs().max() > 1e-4


@pytest.mark.slow
def test_vae_of_xl_computes_in_float32_where_all_else_is_float16(tmp_path: Path) -> None:
    """Its activations overflow in float16; diffusers' own pipeline upcasts it for that reason."""
    dtypes = {}
    for family in UNETS:
        model = ModelConfig(name=save_tiny(family, tmp_path), dtype="float16")
        pipeline = pipeline_of(model)
        assert pipeline.vae.dtype == shapes_of(small(model=model)).vae.dtype
        assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float16
        dtypes[family] = pipeline.vae.dtype
    assert dtypes == {"sd15": torch.float16, "sd21": torch.float16, "sdxl": torch.float32}

    def of(family: Family, vae: dict, **dtypes: str) -> torch.dtype:
        return Description(family=family, network={}, vae=vae, lengths={}).vae_dtype(ModelConfig(**dtypes))

    assert of(SDXL, {"force_upcast": False}, dtype="float16") == torch.float16
    assert of(SDXL, {}, dtype="bfloat16") == torch.bfloat16
    assert of(SD, {}, dtype="bfloat16", vae_dtype="float32") == torch.float32


@pytest.mark.slow
def test_xl_is_told_nothing_for_no_prompt_and_the_size_of_its_images(tmp_path: Path) -> None:
    """Zeros for the empty prompt, as its pipeline has `force_zeros_for_empty_prompt`; sizes in pixels."""
    pipeline = pipeline_of(ModelConfig(name=save_tiny("sdxl", tmp_path), dtype="float32"))
    conditions = encode_prompts(pipeline, PROMPTS)
    assert conditions.text.shape[::2] == (3, 40) and conditions.pooled.shape == (3, 12)
    assert not conditions.text[0].any() and not conditions.pooled[0].any() and conditions.text[1:].any()
    assert conditions.time_ids.tolist() == [16, 16, 0, 0, 16, 16]


@pytest.mark.parametrize(
    "name", ["QwenImagePipeline", "LatentConsistencyModelPipeline", ["pipeline", "Mine"]], ids=lambda name: name[0]
)
def test_pipeline_of_another_family_is_refused(name: object, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    said = rf"it is a {re.escape(str(name))}.*; supported are StableDiffusionPipeline.*_class_name in model_index\.json"
    with pytest.raises(ValueError, match=rf"model\.name.*{said}"):
        Trainer.from_config(config_of(str(tmp_path), memory=MemoryConfig(micro_batch=1, decode_chunk=1)))
