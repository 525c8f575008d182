"""`fastnabla.sample` makes the images of the policy that was trained, whatever the model, its dtypes and its sampler."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastnabla.config.model_sections import LoraConfig, SamplerConfig
from fastnabla.config.train import TrainConfig, to_json
from fastnabla.models.build import build_networks
from fastnabla.models.pipeline import pipeline_of
from fastnabla.models.saved_policy import save_policy
from fastnabla.prompts import RunPrompts
from fastnabla.sample import SampleConfig, sample_run
from fastnabla.training.check_model import check_model
from fastnabla.trajectories.rollout import sample
from fastnabla.utils.seeding import seed_of
from tests.checks import randn
from tests.families import save_tiny
from tests.models.test_families import PROMPTS, config_of

FLOW, FULL = SamplerConfig(scheduler="dance", steps=3, guidance_scale=3.0), LoraConfig(rank=0)
CASES = {
    "full": ("sd15", {}, {"lora": FULL}),
    "without guidance": ("sd15", {}, {"sampler": SamplerConfig(steps=3, guidance_scale=1.0)}),
    "less noise": ("sd15", {}, {"sampler": SamplerConfig(steps=3, guidance_scale=3.0, eta=0.5, min_sigma=0.1)}),
    "dpm": ("sd15", {}, {"sampler": SamplerConfig(scheduler="sde-dpmsolver++", steps=3, guidance_scale=3.0)}),
    "full sd3": ("sd3", {}, {"sampler": FLOW, "lora": FULL}),
    "int8 sd3": ("sd3", {"quantise": "int8"}, {"sampler": FLOW}),
    "nf4 flux": ("flux", {"quantise": "nf4"}, {"sampler": FLOW}),
    "half VAE": ("sd15", {"vae_dtype": "bfloat16"}, {}),
    "half network": ("sd15", {"dtype": "bfloat16", "vae_dtype": "float32"}, {}),
    "float16 sdxl": ("sdxl", {"dtype": "float16"}, {}),  # its VAE stays in float32
}
"""Name → family, changes of the model, changes of the run."""


def policy_images(config: TrainConfig, run: Path) -> Tensor:
    """Images of a policy that differs from the pretrained one, which is saved as a run's."""
    prompts = RunPrompts(texts=PROMPTS, trained=2, evaluated=range(2))
    networks = build_networks(pipeline_of(config.model), prompts, config, torch.device("cpu"))
    with torch.no_grad():
        for number, weight in enumerate(networks.policy.trained().values()):
            weight += 0.3 * randn(*weight.shape, seed=number)
    save_policy(networks.policy, run, networks.policy.dtype)
    (run / "config.json").write_text(to_json(config))
    seeds = [seed_of(0, "evaluation", 0, number) for number in range(2)]
    latents = sample(
        networks.policy,
        networks.table,
        torch.arange(2),
        seeds,
        networks.sample_shape,
        final_noise=False,
        backend="torch",
    )
    return networks.decoder.decode(latents).float()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_samples_are_those_of_the_policy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To float32 rounding, or to that of 16 bits, as a share of what finetuning has changed."""
    family, model, changes = CASES[name]
    config = config_of(save_tiny(family, tmp_path), **changes)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    expected = policy_images(config, tmp_path)
    seen = {}
    monkeypatch.setattr("fastnabla.run.pictures.save_grid", lambda path, columns, *_, **__: seen.update(columns))
    sample_run(SampleConfig(run=tmp_path, prompt=tuple(PROMPTS), n=1))
    pretrained, finetuned = seen.values()
    error, change = (finetuned - expected).norm().item(), (finetuned - pretrained).norm().item()
    assert error < (0.2 if "16" in str(model) else 1e-3) * change


@pytest.mark.parametrize(("family", "scale"), [("sd15", 0.5), ("sd3", 0.5)])
def test_a_guidance_that_diffusers_would_ignore_is_refused(family: str, scale: float, tmp_path: Path) -> None:
    sampler = SamplerConfig(scheduler="ddim" if family == "sd15" else "dance", steps=3, guidance_scale=scale)
    config = config_of(save_tiny(family, tmp_path), sampler=sampler)
    with pytest.raises(
        ValueError, match=r"sampler\.guidance_scale = 0\.5: diffusers' pipelines guide .* use at least 1"
    ):
        check_model(config)
