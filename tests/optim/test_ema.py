"""The average of the weights: its formula, and runs of the testbed that evaluate, save and resume it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from fastnabla import evaluate
from fastnabla.analytic.config import AnalyticConfig
from fastnabla.config.model_sections import LoraConfig, SamplerConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, OptimizerConfig, RolloutConfig
from fastnabla.evaluation.options import FILE
from fastnabla.optim.ema import WeightAverage
from fastnabla.sample import SampleConfig, sample_run
from fastnabla.training.trainer import Trainer
from tests.runs import interrupt, small, smallest, without_pictures

LORA = "lora/pytorch_lora_weights.safetensors"
DECAY = 0.8


def averaging(**changes) -> TrainConfig:
    """Three updates of a step size at which averages differ, each with a rollout, a checkpoint and an evaluation."""
    return small(
        updates=3,
        checkpoint_every=1,
        sampler=SamplerConfig(steps=2, guidance_scale=1),
        optimizer=OptimizerConfig(learning_rate=0.02, ema=DECAY),
        rollout=RolloutConfig(trajectories=2, fraction=0.5, updates=1),
        evaluation=EvaluationConfig(every=2, samples=2, prompts=1),
        **changes,
    )


def record_weights(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    """The trained weights after each update to come, in float64."""
    weights, update = [], trainer.optimizer.update

    def recorded(*arguments):
        norms = update(*arguments)
        weights.append({name: p.detach().double() for name, p in trainer.policy.trained().items()})
        return norms

    trainer.optimizer.update = recorded
    return weights


def closed_form(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    shares = [decay ** (len(weights) - k) for k in range(1, len(weights) + 1)]
    return sum(share * weight for share, weight in zip(shares, weights, strict=True)) / sum(shares)


def evaluations(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == "evaluate"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, list[dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer.from_config(averaging())
    weights = record_weights(trainer)
    trainer.train(folder)
    return folder, trainer, weights


@pytest.mark.parametrize("decay", [0.01, 0.9, 0.999])
def test_agrees_with_the_sum(decay: float) -> None:
    """In float64, to rounding; after every update, the first included."""
    parameter = nn.Parameter(torch.full((3, 2), 7.0, dtype=torch.float64))
    ema, seen = WeightAverage({"weight": parameter}, decay), []
    for number in range(20):
        with torch.no_grad():
            parameter.copy_(torch.randn(3, 2, generator=torch.Generator().manual_seed(number), dtype=torch.float64))
        seen.append(parameter.detach().clone())
        ema.update()
        torch.testing.assert_close(ema.average["weight"], closed_form(seen, decay), rtol=1e-12, atol=1e-14)


def test_is_applied_within_alone() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = WeightAverage({"weight": parameter}, 0.5)
    ema.average["weight"].fill_(5.0)
    with pytest.raises(KeyError), ema.applied():
        assert parameter.tolist() == [5.0, 5.0] and parameter.requires_grad
        raise KeyError
    assert parameter.tolist() == [1.0, 2.0] and ema.average["weight"].tolist() == [5.0, 5.0]


@pytest.mark.slow
def test_the_average_is_of_the_run_s_weights(run) -> None:
    """To float32 rounding: three steps of lerp."""
    _, trainer, weights = run
    assert len(weights) == 3
    for name, average in trainer.ema.average.items():
        expected = closed_form([seen[name] for seen in weights], DECAY)
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_is_evaluated_and_saved_beside_the_weights(run) -> None:
    folder, trainer, _ = run
    first, *others = evaluations(folder)
    assert [record["update"] for record in others] == [2, 3] and not [name for name in first if "ema" in name]
    for record in others:
        raw = {name for name in record if not name.startswith("ema_")} - {"phase", "update"}
        assert {name.removeprefix("ema_") for name in record if name.startswith("ema_")} == raw
        assert record["ema_reward"] != record["reward"]
    with trainer.ema.applied():
        assert trainer.evaluator.measure(trainer.evaluator.images())["reward"] == others[-1]["ema_reward"]
    table = (folder / "table.md").read_text().splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1] for line in table if line.startswith("| ")}
    assert rows["ema_reward"] == rows["reward"] == f"{first['reward']:.4f}"

    raw, averaged = load_file(folder / LORA), load_file(folder / "ema" / LORA)
    assert raw.keys() == averaged.keys() and any(not torch.equal(raw[name], averaged[name]) for name in raw)
    pipeline = StableDiffusionPipeline.from_pretrained(smallest("sd15"))
    pipeline.load_lora_weights(folder / "ema" / "lora")
    loaded = [p.detach() for name, p in pipeline.unet.named_parameters() if "lora_" in name]
    assert all(torch.equal(a, b) for a, b in zip(loaded, trainer.ema.average.values(), strict=True))


@pytest.mark.slow
def test_the_weights_themselves_are_as_without_an_average(run, tmp_path: Path) -> None:
    config = averaging()
    config.optimizer = dataclasses.replace(config.optimizer, ema=None)
    without_pictures(Trainer.from_config(config)).train(tmp_path)
    for record, plain in zip(evaluations(run[0]), evaluations(tmp_path), strict=True):
        assert {name: value for name, value in record.items() if not name.startswith("ema_")} == plain
    ours, plain = load_file(run[0] / LORA), load_file(tmp_path / LORA)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert not (tmp_path / "ema").exists()
    with pytest.raises(ValueError, match=r"weights = 'ema'.*without optimizer\.ema"):
        sample_run(SampleConfig(run=tmp_path, weights="ema"))


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(run, tmp_path: Path) -> None:
    trainer = without_pictures(Trainer.from_config(averaging()))
    interrupt(trainer, 3)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tmp_path)
    resumed = without_pictures(Trainer.from_config(averaging()))
    resumed.train(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (run[0] / "metrics.jsonl").read_bytes()
    for name, average in run[1].ema.average.items():
        assert torch.equal(resumed.ema.average[name], average)


@pytest.mark.slow
def test_is_measured_and_sampled_alone(run, tmp_path: Path, drawn: None) -> None:
    """Of the average, evaluation takes its weights; the results have a file of their own."""
    options = ["--samples-per-prompt=2", "--reference-samples=4", "--ess=0.5"]
    assert evaluate.main([str(run[0]), *options, "--weights=ema"]) == 0
    assert not (run[0] / FILE).exists()
    assert evaluate.main([str(run[0]), *options]) == 0
    averaged, raw = (json.loads((run[0] / name).read_text()) for name in ("evaluation-ema.json", FILE))
    ours, theirs = averaged["groups"]["trained"], raw["groups"]["trained"]
    assert ours["pretrained"] == theirs["pretrained"] and ours["finetuned"]["reward"] != theirs["finetuned"]["reward"]
    pictures = [
        sample_run(SampleConfig(run=run[0], n=1, weights=weights, output=tmp_path / f"{weights}.png")).read_bytes()
        for weights in ("raw", "ema")
    ]
    assert pictures[0] != pictures[1]


@pytest.mark.slow
def test_full_finetuning_with_a_skipped_update(tmp_path: Path) -> None:
    """An update that is skipped gives no weights to average."""
    config = averaging(lora=LoraConfig(rank=0))
    config.optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-4)
    config.evaluation, config.checkpoint_every = dataclasses.replace(config.evaluation, every=0), 9
    trainer = without_pictures(Trainer.from_config(config))
    weights, clip, calls = record_weights(trainer), trainer.optimizer._clip, []

    def poisoned(parameters):
        calls.append(None)  # two groups an update
        return clip(parameters) * (float("nan") if len(calls) == 3 else 1)

    trainer.optimizer._clip = poisoned
    trainer.train(tmp_path)
    assert trainer.ema.updates == 2
    raw, averaged = (UNet2DConditionModel.from_pretrained(tmp_path / f / "unet").state_dict() for f in ("", "ema"))
    assert averaged.keys() == trainer.ema.average.keys() == raw.keys()
    for name, average in averaged.items():
        assert torch.equal(average, trainer.ema.average[name])
        expected = closed_form([weights[0][name], weights[2][name]], DECAY)
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5])
def test_decay_is_checked(value: float) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.ema = {value}: must be in \(0, 1\)"):
        OptimizerConfig(ema=value)
    with pytest.raises(ValueError, match=r"optimizer\.ema = 0\.5: the analytic testbed"):
        AnalyticConfig(optimizer=OptimizerConfig(ema=0.5))
