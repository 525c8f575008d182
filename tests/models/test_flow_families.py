"""SD3, SD3.5 and FLUX sample as plain diffusers does, train, are saved, and are loaded again."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file
from torch import Tensor

from fastnabla.config.model_sections import ModelConfig, RewardConfig, SamplerConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, RolloutConfig
from fastnabla.evaluation.options import EvaluationOptions
from fastnabla.evaluation.run import RunEvaluation
from fastnabla.models.build import Networks, build_networks
from fastnabla.models.kohya import save_kohya
from fastnabla.models.pipeline import family_of_pipeline, pipeline_of, reading_tokenizers
from fastnabla.models.random_init import random_pipeline
from fastnabla.models.sampler import use_sampler
from fastnabla.models.saved_policy import load_policy, read_policy
from fastnabla.prompts import RunPrompts, warn_truncated
from fastnabla.sample import SampleConfig, sample_run
from fastnabla.study.measuring import _Networks
from fastnabla.study.parts import Part
from fastnabla.table_scheduler import TableScheduler
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.rollout import sample
from fastnabla.utils.seeding import seed_of
from tests.checks import randn
from tests.families import FLOW_MODELS, TRAINED, save_tiny
from tests.faults import assert_same_result
from tests.runs import interrupt, small, without_pictures

PROMPTS, SEEDS, STEPS = ["a cat", "a dog"], [1, 2], 3
SIZE = {"height": 16, "width": 24}
"""Pixels: latents of 8 × 12."""


def config_of(model: str, guidance_scale: float = 3.0, **changes) -> TrainConfig:
    settings = {
        "updates": 2,
        "checkpoint_every": 1,
        "model": ModelConfig(name=model, dtype="float32", **SIZE),
        "sampler": SamplerConfig(steps=STEPS, guidance_scale=guidance_scale),
        "reward": RewardConfig(terms=("hue=1",)),
        "rollout": RolloutConfig(trajectories=2, fraction=0.5, updates=2),
        "evaluation": EvaluationConfig(every=2, samples=2, prompts=2),
    }
    return small(**(settings | changes))


@pytest.fixture(scope="module", params=list(FLOW_MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(request.param, tmp_path_factory.mktemp("models"))


def networks_of(config: TrainConfig) -> Networks:
    prompts = RunPrompts(texts=PROMPTS, trained=2, evaluated=range(2))
    return build_networks(pipeline_of(config.model), prompts, config, torch.device("cpu"))


def own_latents(networks: Networks, seeds: list[int] = SEEDS) -> Tensor:
    """As an evaluation samples them."""
    policy, table, shape = networks.policy, networks.table, networks.sample_shape
    return sample(policy, table, torch.arange(2), seeds, shape, final_noise=False, backend="torch")


def plain(model: str) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_images(pipeline: DiffusionPipeline, config: TrainConfig, **settings: object) -> Tensor:
    """What diffusers makes of `PROMPTS`, from the noise of `SEEDS`."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    if isinstance(pipeline.scheduler, TableScheduler):
        pipeline.scheduler.generator = generators
    arguments = {"num_inference_steps": STEPS, "guidance_scale": config.sampler.guidance_scale, "output_type": "pt"}
    return pipeline(PROMPTS, generator=generators, **SIZE, **(arguments | settings)).images


def table_images(pipeline: DiffusionPipeline, config: TrainConfig, sample_shape: tuple[int, int, int]) -> Tensor:
    """`plain_images` by the steps of the sampler of `config`."""
    family = family_of_pipeline(pipeline)
    table = use_sampler(pipeline, config.sampler, family.tokens(pipeline.transformer.config, *sample_shape[1:]))
    pipeline.scheduler = TableScheduler(table, pipeline.scheduler.config)
    if isinstance(pipeline, FluxPipeline):
        pipeline.scheduler.latents = sample_shape
    return plain_images(pipeline, config)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_without_noise_the_policy_samples_as_euler_s_method(model: str, guidance_scale: float) -> None:
    """diffusers' own scheduler, with its shift. Noise of η = 1e-6 is invisible; the rest is float32 rounding."""
    sampler = SamplerConfig(scheduler="dance", eta=1e-6, steps=STEPS, guidance_scale=guidance_scale)
    config = config_of(model, sampler=sampler)
    networks = networks_of(config)
    own = networks.decoder.decode(own_latents(networks))
    pipeline = plain(model)
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    expected = plain_images(pipeline, config, sigmas=np.linspace(1, 1 / STEPS, STEPS))
    assert expected.std() > 0.01
    torch.testing.assert_close(own, expected, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_with_noise_the_policy_samples_as_a_pipeline_with_its_table(model: str, guidance_scale: float) -> None:
    config = config_of(model, guidance_scale)
    networks = networks_of(config)
    own = networks.decoder.decode(own_latents(networks))
    torch.testing.assert_close(own, table_images(plain(model), config, networks.sample_shape), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_guidance_is_an_input_of_flux_and_a_second_row_of_sd3(model: str) -> None:
    """Both change the images."""
    networks, unguided = networks_of(config_of(model, 3.0)), networks_of(config_of(model, 1.0))
    policy, is_input = networks.policy, "flux" in model
    output = policy(torch.zeros(2, *networks.sample_shape), torch.full((2,), 500.0), torch.arange(2))
    assert len(output) == (2 if is_input else 4)
    assert (policy.guidance_scale is None) == is_input and ("guidance" in policy.conditions.shared) == is_input
    assert (own_latents(networks) - own_latents(unguided)).abs().max() > 1e-3


class Run(NamedTuple):
    """A finished run."""

    config: TrainConfig
    folder: Path
    trainer: Trainer


def trained_run(config: TrainConfig, folder: Path) -> Run:
    trainer = without_pictures(Trainer.from_config(config))
    trainer.train(folder)
    return Run(config, folder, trainer)


@pytest.fixture(scope="module")
def run(model: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained_run(config_of(model), tmp_path_factory.mktemp("run"))


def assert_loads(run: Run) -> None:
    """In plain diffusers and in a new policy, both of which sample the same."""
    pipeline, config = plain(run.config.model.name), run.config
    before = table_images(pipeline, config, run.trainer.components.sample_shape)
    load_policy(pipeline, run.folder)
    loaded = plain_images(pipeline, config)
    own = networks_of(config)
    read_policy(own.policy, run.folder)
    torch.testing.assert_close(own.decoder.decode(own_latents(own)), loaded, rtol=0, atol=2e-5)
    assert (loaded - before).abs().max() > 1e-4
    for name, parameter in own.policy.trained().items():
        assert torch.equal(parameter, run.trainer.policy.trained()[name]), name


def interrupted_and_resumed(config: TrainConfig, folder: Path) -> None:
    interrupted = without_pictures(Trainer.from_config(config))
    interrupt(interrupted, 2)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train(folder)
    without_pictures(Trainer.from_config(config)).train(folder, resume=True)


@pytest.mark.slow
def test_a_trained_lora_loads_in_plain_diffusers(run: Run) -> None:
    assert_loads(run)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd35", "flux"], indirect=True)
def test_a_lora_on_all_linear_layers_loads_in_plain_diffusers(model: str, tmp_path: Path) -> None:
    """SD3's kinds of layers are all in SD3.5."""
    assert_loads(trained_run(config_of(model, lora=TRAINED["LoRA on all linear layers"]), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flux"], indirect=True)
def test_a_run_resumes(run: Run, tmp_path: Path) -> None:
    interrupted_and_resumed(run.config, tmp_path)
    assert_same_result(tmp_path, run.folder)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd35", "flux"], indirect=True)
def test_all_weights_load_in_plain_diffusers_and_a_run_resumes(model: str, tmp_path: Path) -> None:
    config, whole, cut = config_of(model, lora=TRAINED["all weights"]), tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    assert_loads(trained_run(config, whole))
    interrupted_and_resumed(config, cut)
    ours, theirs = (load_file(run / "transformer/diffusion_pytorch_model.safetensors") for run in (cut, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_recomputed_blocks_give_the_same_gradients(model: str) -> None:
    """Of a pass with gradients to the state and to the LoRA, to float32 rounding."""
    gradients = []
    for checkpoint in (False, True):
        config = config_of(model)
        config.memory = dataclasses.replace(config.memory, checkpoint_network=checkpoint)
        networks = networks_of(config)
        policy, parameters = networks.policy, networks.policy.trainable()
        for number, parameter in enumerate(parameters):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
        x = randn(2, *networks.sample_shape).requires_grad_()
        output = policy(x, torch.tensor([900.0, 300.0]), torch.arange(2))
        gradients.append(torch.autograd.grad(output.square().sum(), [x, *parameters]))
        assert (
            any(getattr(module, "gradient_checkpointing", False) for module in policy.network.modules()) == checkpoint
        )
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-5, atol=1e-6)


def test_prompts_are_cut_where_t5_cuts_them(model: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizers = reading_tokenizers(pipeline_of(config_of(model).model))
    limit = 512 if "flux" in model else 256
    warn_truncated([" ".join(["cat"] * (limit - 2))], *tokenizers)
    assert not caplog.messages
    warn_truncated([" ".join(["cat"] * (limit - 1))], *tokenizers)
    assert f"1 of the run's 1 prompts are longer than the {limit} tokens of the text encoder" in caplog.text


def test_a_flux_without_guidance_reads_fewer_tokens() -> None:
    """FLUX.1-schnell was trained with 256; its tokenizer has 512."""
    full = FLOW_MODELS["flux"]
    schnell = dataclasses.replace(full, network=full.network | {"guidance_embeds": False})
    pipeline = random_pipeline(schnell, {"default": torch.float32})
    family = family_of_pipeline(pipeline)
    family.limit_tokenizers(pipeline)
    shape = family.embedding_shapes(pipeline.transformer.config, family.text_lengths)["text"]
    assert family.encode(pipeline, ["a cat"])[0].shape == (1, *shape) and shape[0] == 256
    assert family.sampling_arguments(pipeline) == {"max_sequence_length": 256}


def test_all_repeated_blocks_are_compiled(model: str) -> None:
    """``compile=blocks`` covers every module list of the network that holds blocks."""
    network, family = plain(model).transformer, family_of_pipeline(plain(model))
    lists = [each for name, each in network.named_children() if name.endswith("transformer_blocks")]
    assert lists and all(isinstance(block, family.blocks) for each in lists for block in each)


@pytest.mark.slow
def test_a_finished_run_is_sampled_as_the_policy_samples(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the noise and the prompt's tokens of training. Kohya's names are refused."""
    grids = []
    monkeypatch.setattr("fastnabla.run.pictures.save_grid", lambda path, columns, *_, **__: grids.append(columns))
    sample_run(SampleConfig(run=run.folder, prompt=tuple(PROMPTS), n=1, output=tmp_path / "samples.png"))

    networks = networks_of(run.config)
    read_policy(networks.policy, run.folder)
    seeds = [seed_of(0, "evaluation", 0, number) for number in range(2)]
    _, finetuned = grids[0].values()
    own = networks.decoder.decode(own_latents(networks, seeds))
    torch.testing.assert_close(finetuned, own, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"LoRA of a transformer; load pytorch_lora_weights\.safetensors"):
        save_kohya(run.folder, tmp_path / "kohya.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd35"], indirect=True)
def test_every_evaluation_takes_the_mean_of_the_last_step(run: Run) -> None:
    """In training, of a finished run, and in a study; the last two here of the pretrained model. A rollout has the step's noise,
    σ = 0.02. In batches of other sizes samples differ by rounding."""
    config, folder, trainer = run
    options = EvaluationOptions(samples_per_prompt=2, reference_samples=4, ess=0.5)
    RunEvaluation(folder, options).measure()
    reference = load_file(folder / "reference-trained.safetensors")["latents"]
    studied = _Networks(config, None)
    part = Part(path=folder, scale=1.0, samples=1, seed=0)
    samples = {
        "training": (trainer.components, trainer.evaluator.sample(torch.tensor([0, 2]), 0), [(0, 0), (0, 2)]),
        "evaluate": (studied.components, reference[:, 0], [(1, 0, 0), (1, 1, 0)]),
        "study": (studied.components, studied._sample([0, 1], part, lambda count: None)[:, 0], [(2, 0, 0), (2, 1, 0)]),
    }
    for name, (components, latents, keys) in samples.items():
        expected = own_latents(components, [seed_of(0, "evaluation", *key) for key in keys])
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5, msg=name)

    buffer, prompt = trainer.components.buffer, torch.arange(2)
    buffer.clear()
    slots = buffer.reserve(torch.tensor([[0, STEPS - 1]] * 2), prompt)
    finished = trainer.sampler(prompt, SEEDS, buffer, slots)
    noise = finished - own_latents(trainer.components)
    assert 0.01 < noise.std() < 0.03
