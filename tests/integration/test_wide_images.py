"""Images that are not square are trained on, evaluated and sampled as plain diffusers does with `height` and `width`."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from fastnabla.config.model_sections import ModelConfig
from fastnabla.config.train import TrainConfig, load_run
from fastnabla.cost.shapes import shapes_of
from fastnabla.evaluation.options import EvaluationOptions
from fastnabla.evaluation.run import RunEvaluation
from fastnabla.models.build import build_networks
from fastnabla.models.flow import build_flow
from fastnabla.models.pipeline import pipeline_of
from fastnabla.models.saved_policy import load_policy
from fastnabla.prompts import RunPrompts
from fastnabla.run.resuming import AUTO, run_to_resume
from fastnabla.sample import SampleConfig, sample_run
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.rollout import sample
from tests.families import save_tiny
from tests.models.test_families import PROMPTS, config_of, plain_images

HEIGHT, WIDTH = 16, 24


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Of one model whose own size is wide, and of one that is given a wide size."""
    model = Path(save_tiny(request.param, tmp_path_factory.mktemp("models")))
    if request.param == "sdxl":
        return wide(ModelConfig(name=str(model), dtype="float32", height=HEIGHT, width=WIDTH))
    unet = model / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"sample_size": [HEIGHT // 2, WIDTH // 2]}))
    return wide(ModelConfig(name=str(model), dtype="float32"))


def wide(model: ModelConfig) -> TrainConfig:
    base = config_of(model.name)
    rollout = dataclasses.replace(base.rollout, updates=1)
    evaluation = dataclasses.replace(base.evaluation, every=1)
    return dataclasses.replace(base, model=model, rollout=rollout, updates=1, evaluation=evaluation)


def plain(config: TrainConfig) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(config.model.name, dtype=torch.float32)


@pytest.mark.slow
def test_policy_samples_what_plain_diffusers_does(config: TrainConfig) -> None:
    expected = plain_images(plain(config), config, height=HEIGHT, width=WIDTH)
    prompts = RunPrompts(texts=PROMPTS, trained=2, evaluated=range(2))
    networks = build_networks(pipeline_of(config.model), prompts, config, torch.device("cpu"))
    assert networks.sample_shape == shapes_of(config).sample_shape == (4, HEIGHT // 2, WIDTH // 2)
    assert shapes_of(config).image_size == (HEIGHT, WIDTH)
    with networks.policy.pretrained_weights():
        latents = sample(
            networks.policy, networks.table, torch.arange(2), [1, 2], networks.sample_shape, backend="torch"
        )
    images = networks.decoder.decode(latents)
    assert images.shape == (2, 3, HEIGHT, WIDTH)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)


def test_a_unet_as_flow_takes_sizes_that_its_levels_do_not_divide() -> None:
    x = torch.randn(1, 4, HEIGHT // 2, WIDTH // 2)
    flow = build_flow("unet", 4, 8, seed=0, start="random")
    assert flow(x, torch.zeros(1), torch.randn(1, 3, 8)).shape == x.shape


@pytest.mark.slow
def test_a_wide_run_is_trained_sampled_evaluated_and_resumed(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, grids = tmp_path / "run", []
    run.mkdir()
    Trainer.from_config(config).train(run)

    monkeypatch.setattr("fastnabla.run.pictures.save_grid", lambda path, columns, *_, **__: grids.append(columns))
    sample_run(SampleConfig(run=run, prompt=tuple(PROMPTS), n=1))
    sample_run(SampleConfig(run=run, prompt=tuple(PROMPTS), n=1, lora_scale=(0, 1, 4)))
    ((pretrained, finetuned), scaled) = (columns.values() for columns in grids)
    assert pretrained.shape == finetuned.shape == (2, 3, HEIGHT, WIDTH) and not torch.equal(pretrained, finetuned)
    assert list(grids[1]) == ["pretrained", "LoRA × 0", "LoRA × 1", "LoRA × 4"]
    for images, expected in zip(scaled, (pretrained, pretrained, finetuned), strict=False):
        assert torch.equal(images, expected)
    assert (grids[1]["LoRA × 4"] - pretrained).norm() > (finetuned - pretrained).norm()
    pipeline = plain(config)
    before = plain_images(pipeline, config, height=HEIGHT, width=WIDTH)
    load_policy(pipeline, run)
    assert not torch.equal(plain_images(pipeline, config, height=HEIGHT, width=WIDTH), before)

    options = EvaluationOptions(samples_per_prompt=2, reference_samples=4, ess=0.5)
    measured = RunEvaluation(run, options).measure()
    assert measured["groups"]["trained"]["finetuned"]["reward"] != measured["groups"]["trained"]["pretrained"]["reward"]

    assert load_run(run).model == config.model
    again = dataclasses.replace(config, run=run, resume=AUTO)
    assert run_to_resume(again)[0] == run
    other = dataclasses.replace(again, model=dataclasses.replace(config.model, height=32))
    with pytest.raises(ValueError, match=rf"model\.height = {config.model.height}, not 32"):
        run_to_resume(other)
