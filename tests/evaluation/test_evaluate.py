"""Whole evaluations of tiny runs of the testbed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fastnabla import evaluate
from fastnabla.comparison.tables import target_sheets
from fastnabla.config.model_sections import LoraConfig, PromptConfig, RewardConfig
from fastnabla.config.train import TrainConfig, load_run, to_json
from fastnabla.config.training_sections import OptimizerConfig
from fastnabla.evaluation import run as run_module
from fastnabla.evaluation.options import FILE, EvaluationOptions
from fastnabla.evaluation.report import result_tables
from fastnabla.evaluation.run import REFERENCE_NOISE, RunEvaluation
from fastnabla.metrics.diversity import hue_entropy_ceiling
from fastnabla.metrics.joint_entropy import joint_entropy_ceiling
from fastnabla.metrics.measures import Measures
from fastnabla.models.decoder import Decoder
from fastnabla.models.saved_policy import read_policy
from fastnabla.run.checkpoint import newest_checkpoint
from fastnabla.training.trainer import Trainer
from tests.runs import small, train, without_pictures

QUICK = ["--samples-per-prompt=3", "--reference-samples=12", "--ess=0.25"]
OPTIONS = EvaluationOptions(samples_per_prompt=3, reference_samples=12, ess=0.25)
LORA = "lora/pytorch_lora_weights.safetensors"


def tiny(**changes) -> TrainConfig:
    """Two updates, with some prompts held out."""
    base = small(
        updates=2, prompts=PromptConfig(source="animals", held_out=0.5), reward=RewardConfig(terms=("area=8", "hue=1"))
    )
    base = dataclasses.replace(base, optimizer=OptimizerConfig(learning_rate=0.02))
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """After its training."""
    trainer = without_pictures(Trainer.from_config(tiny()))
    trainer.train(tmp_path_factory.mktemp("runs"))
    return trainer


@pytest.fixture(scope="module")
def run(trained: Trainer) -> Path:
    assert evaluate.main([str(trained.folder), *QUICK]) == 0
    return trained.folder


def results(folder: Path) -> dict:
    return json.loads((folder / FILE).read_text(), parse_constant=lambda name: pytest.fail(name))


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of the run without the files of its evaluation."""
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("reference-*", FILE)))


@pytest.mark.slow
def test_results_are_complete(run: Path) -> None:
    found = results(run)
    assert found["groups"].keys() == {"trained", "held_out"}
    assert found["update"] == 2
    assert found["settings"]["beta"] == 300 and found["settings"]["reference_samples"] == 12
    prompts = [group["prompts"] for group in found["groups"].values()]
    assert len(prompts[0]) == 2 and prompts[1] and not set(prompts[0]) & set(prompts[1])
    for group in found["groups"].values():
        for model in ("pretrained", "finetuned"):
            assert group[model].keys() >= {
                "reward", "reward_std", "reward_area", "reward_hue", "pairwise_distance", "vendi", "hue_entropy",
                "joint_entropy", "dark_grounds",
            }  # fmt: skip
            assert group[model].keys() >= group["reference_floor"].keys() >= {
                "frechet_to_reference", "frechet_to_reference_within_prompts", "kernel_distance_to_reference",
                "pixel_kernel_distance_to_reference",
            }  # fmt: skip
        assert group["divergence"]["nats"] > group["divergence"]["without_last_two"] > 0
        assert group["hue_entropy_ceiling"] == hue_entropy_ceiling(3)
        assert group["joint_entropy_ceiling"] == joint_entropy_ceiling(3)
        assert sum(group["divergence"]["by_step"]) == pytest.approx(group["divergence"]["nats"])
        target = group["targets"]["tilted"]
        assert 0 < target["beta"] < 200
        assert target["smallest_ess"] == pytest.approx(0.25 * 12, rel=1e-6) and target["ess"] >= 0.25 * 12
        assert target["reference_samples"] == 12 * len(group["prompts"])
        assert target["floor"].keys() == target["finetuned"].keys() == target["pretrained"].keys()
        gap = group["finetuned"]["reward"] - target["reward"]
        assert target["finetuned"]["reward_gap"] == pytest.approx(gap, abs=1e-6)
    assert not list(run.glob("*.partial"))


@pytest.mark.slow
def test_the_table_has_a_column_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a second run reuses the first one's reference samples."""
    other = copy_of(run, tmp_path / "other-run")
    assert evaluate.main([str(run), str(other), *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "other-run" in printed and "held-out prompts" in printed and "hue_total_variation" in printed
    assert not list(other.glob("reference-*"))
    assert {**results(other), "run": ""} == {**results(run), "run": ""}


def test_the_memory_of_training_does_not_bound_an_evaluation(run: Path, tmp_path: Path) -> None:
    """A run with `vram` was planned to the last byte, perhaps by a version that counted less."""
    other = copy_of(run, tmp_path / "planned")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vram": 0.001}))
    RunEvaluation(other, OPTIONS, [run])


@pytest.mark.slow
def test_a_run_beside_it_shares_its_reference_samples_in_a_later_evaluation(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = copy_of(run, run.parent / "beside")
    original = RunEvaluation._sample

    def watched(self, numbers, samples, noise, recorder=None):
        assert noise != REFERENCE_NOISE
        return original(self, numbers, samples, noise, recorder)

    monkeypatch.setattr(RunEvaluation, "_sample", watched)
    assert RunEvaluation(beside, OPTIONS).measure()["groups"] == results(run)["groups"]
    assert not list(beside.glob("reference-*"))
    shutil.rmtree(beside)


@pytest.mark.slow
def test_only_one_prompt_s_images_are_decoded_at_a_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, original = [], Decoder.decode
    monkeypatch.setattr(
        Decoder, "decode", lambda self, latents: decoded.append(len(latents)) or original(self, latents)
    )
    monkeypatch.setattr(run_module, "REFERENCE_CHUNK", 5)
    groups = RunEvaluation(run, OPTIONS).measure()["groups"]
    assert max(decoded) == 5 and decoded.count(3) >= 2 * sum(len(group["prompts"]) for group in groups.values())


@pytest.mark.slow
def test_reference_samples_are_kept_for_their_seed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of(run, tmp_path / "run")
    for group in results(run)["groups"]:
        shutil.copy(run / f"reference-{group}.safetensors", folder)
    drawn = []
    original = RunEvaluation._sample

    def watched(self, numbers, samples, noise, recorder=None):
        drawn.append((noise, samples))
        return original(self, numbers, samples, noise, recorder)

    monkeypatch.setattr(RunEvaluation, "_sample", watched)
    for seed, reference in ((0, []), (1, [range(12)] * 2)):
        drawn.clear()
        RunEvaluation(folder, dataclasses.replace(OPTIONS, probe="none", seed=seed)).measure()
        assert [samples for noise, samples in drawn if noise == REFERENCE_NOISE] == reference


@pytest.mark.slow
def test_a_policy_that_learned_nothing_is_the_pretrained_one(run: Path, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path / "run")
    weights = load_file(folder / LORA)
    save_file({name: weight * ("lora_A" in name) for name, weight in weights.items()}, folder / LORA)
    for group in RunEvaluation(folder, OPTIONS).measure()["groups"].values():
        # B = 0 adds zeros, but W x may be rounded in another order; features amplify this to about 1e-5.
        assert group["finetuned"] == pytest.approx(group["pretrained"], rel=1e-3, abs=1e-6)
        assert group["divergence"]["nats"] < 1e-6
        tilted = group["targets"]["tilted"]
        assert tilted["finetuned"] == pytest.approx(tilted["pretrained"], rel=1e-3, abs=1e-5)
        # Its reward is that of the reference samples, or slightly more by chance.
        same = group["targets"]["same_reward"]
        assert same is None or same["finetuned"]["reward_gap"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_the_saved_lora_is_read_exactly(trained: Trainer) -> None:
    fresh = Trainer.from_config(tiny())
    read_policy(fresh.policy, trained.folder)
    expected = trained.policy.trained()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in fresh.policy.trained().items())
    assert any(parameter.abs().max() > 0 for name, parameter in expected.items() if "lora_B" in name)


@pytest.mark.slow
def test_all_parameters_are_read_exactly_and_evaluated(tmp_path: Path) -> None:
    config = tiny(lora=LoraConfig(rank=0), optimizer=OptimizerConfig(learning_rate=1e-4))
    (tmp_path / "run").mkdir()
    trainer = without_pictures(Trainer.from_config(config))
    trainer.train(tmp_path / "run")
    evaluation = RunEvaluation(tmp_path / "run", OPTIONS)
    read = evaluation.components.policy.trained()
    assert all(torch.equal(parameter, read[name]) for name, parameter in trainer.policy.trained().items())
    found = evaluation.measure()["groups"]["trained"]
    assert found["divergence"]["nats"] > 0 and found["finetuned"]["reward"] != found["pretrained"]["reward"]


@pytest.mark.slow
@pytest.mark.parametrize(("prior_weight", "beta"), [(0.5, 0.02), (0.0, None)])
def test_the_target_is_tilted_by_beta_over_lambda(
    prior_weight: float, beta: float | None, run: Path, tmp_path: Path
) -> None:
    folder = copy_of(run, tmp_path / "run")
    saved = json.loads((folder / "config.json").read_text())
    saved["objective"] |= {"beta": 0.01, "prior_weight": prior_weight, "reverse_target": "reference"}
    (folder / "config.json").write_text(json.dumps(saved))
    result = RunEvaluation(folder, OPTIONS).measure()
    assert result["settings"]["target_beta"] == beta
    target = result["groups"]["trained"]["targets"]["tilted"]
    assert (target and target["beta"]) == beta
    console = Console(width=200)
    with console.capture() as capture:
        console.print(result_tables([result])[0])
    assert "joint_entropy, share of its ceiling" in capture.get() and "without the last two steps" in capture.get()
    assert "frechet_to_reference_within_prompts (the paper's per-prompt FID)" in capture.get()
    (sheet, *_) = target_sheets({"a": [result], "b": [results(run)]})
    columns = dict(zip(sheet.columns, sheet.rows[0], strict=True))
    assert ("none: λ = 0" in capture.get()) == (columns["β"] == "none for its λ") == (beta is None)


def test_weights_of_another_rank_are_refused(run: Path, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path / "run")
    saved = json.loads((folder / "config.json").read_text())
    saved["lora"]["rank"] = 4
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="do not fit"):
        RunEvaluation(folder, OPTIONS)


@pytest.mark.slow
def test_a_normalised_reward_tilts_by_what_was_trained_on(tmp_path: Path) -> None:
    config = tiny()
    folder = train(
        dataclasses.replace(config, reward=dataclasses.replace(config.reward, normalise=True)), tmp_path / "run"
    )
    evaluation = RunEvaluation(folder, OPTIONS)
    checkpoint, _ = newest_checkpoint(folder)
    state = torch.load(checkpoint / "state.pt", weights_only=True)["reward"]
    assert evaluation.components.reward.state_dict() == state and state["area"]["count"] > 0
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match=r"reward\.normalise"):
        RunEvaluation(folder, OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "not a run folder"),
        (["unfinished"], "has no trained weights"),
        ([], "run folder"),
        (["nowhere", "--samples-per-prompt=1"], "samples_per_prompt = 1"),
        (["nowhere", "--reference-samples=3"], "reference_samples = 3"),
        (["nowhere", "--reference-samples=10"], "more than one sample"),
        (["nowhere", "--ess=2"], "ess = 2"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], words: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("unfinished").mkdir()
    shutil.copy(run / "config.json", "unfinished")
    try:
        assert evaluate.main(arguments) == 2
    except SystemExit as stop:
        assert stop.code == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert words in message and "Traceback" not in message


@pytest.mark.slow
def test_what_only_training_needs_is_not_needed(run: Path, tmp_path: Path) -> None:
    """A GPU, Triton's kernels, xformers, paged moments, wandb, memory, and a probe for a bound."""
    config = load_run(run)
    config = dataclasses.replace(
        config,
        device="cuda",
        backend="triton",
        tracker="wandb",
        vram=0.001,
        compute=dataclasses.replace(config.compute, attention="xformers"),
        optimizer=dataclasses.replace(config.optimizer, name="paged_adamw8bit"),
        evaluation=dataclasses.replace(config.evaluation, stop_below_diversity=0.1, stop_above_prior=2.0),
    )
    copy = copy_of(run, tmp_path / "copy")
    (copy / "config.json").write_text(to_json(config))
    assert evaluate.main([str(copy), *QUICK, "--probe=none"]) == 0
    assert (
        results(copy)["groups"]["trained"]["finetuned"]["reward"]
        == results(run)["groups"]["trained"]["finetuned"]["reward"]
    )


def test_a_reward_that_is_not_finite_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = RunEvaluation(run, OPTIONS)
    original = run_module.measure_images

    def broken(images: torch.Tensor, prompt: torch.Tensor, *arguments: object) -> Measures:
        measures = original(images, prompt, *arguments)
        measures.reward[prompt == 1] = torch.nan
        return measures

    monkeypatch.setattr(run_module, "measure_images", broken)
    with pytest.raises(ValueError, match=r"12 of \d+ samples or their rewards are not finite, first of the prompt 'a "):
        evaluation.measure()
