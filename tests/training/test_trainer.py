"""Whole runs, cut down to seconds."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import load_file

from fastnabla.config.model_sections import ModelConfig, RewardConfig, SamplerConfig
from fastnabla.config.training_sections import EvaluationConfig, OptimizerConfig
from fastnabla.distributed.signals import Stopped, StopSignals
from fastnabla.methods.passes import planned_passes
from fastnabla.objective.settings import Objective
from fastnabla.training.trainer import Trainer
from fastnabla.utils.seeding import seed_of
from tests.checks import BACKENDS
from tests.faults import assert_same_result
from tests.runs import copy_after_update_1, interrupt, small, smallest, train, without_pictures


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    Trainer.from_config(small()).train(folder)
    return folder


@pytest.mark.slow
def test_run_folder_is_complete(run: Path) -> None:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "curves.png",
        "table.md",
        "checkpoints/update-000002/manifest.json",
        "checkpoints/update-000002/state.pt",
        "checkpoints/update-000004/manifest.json",
        "checkpoints/update-000004/state.pt",
        "lora/pytorch_lora_weights.safetensors",
        "samples/update-0002.png",
        "samples/update-0004.png",
    }
    assert not [name for name in names if name.endswith(".partial")]


def test_records(run: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["phase"], r["update"]) for r in records] == [
        ("evaluate", 0),
        ("train", 1),
        ("train", 2),
        ("evaluate", 2),
        ("train", 3),
        ("train", 4),
        ("evaluate", 4),
    ]
    training = [r for r in records if r["phase"] == "train"]
    assert all((r["passes_inner"], r["passes_last"]) == (7, 3) for r in training)
    # The first update of a rollout trains the policy that sampled; the second has moved away from it.
    assert training[0]["loss_trust_region"] < 1e-9 < training[1]["loss_trust_region"]


@pytest.mark.slow
def test_another_seed_gives_other_metrics(run: Path, tmp_path: Path) -> None:
    """The same seed gives the same, bit for bit, as the next test shows."""
    other = train(small(seed=1, updates=2), tmp_path / "other")
    ours, theirs = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (other, run))
    assert ours[0] != theirs[0] and ours[1] != theirs[1]


def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    trainer = without_pictures(Trainer.from_config(small()))
    interrupt(trainer, 4)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["update-000002"]
    without_pictures(Trainer.from_config(small())).train(tmp_path, resume=True)
    assert_same_result(tmp_path, run)


@pytest.mark.slow
def test_moments_of_8_bits_are_resumed(tmp_path: Path) -> None:
    config = small(updates=2, optimizer=dataclasses.replace(small().optimizer, name="lion8bit"))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    trainer = without_pictures(Trainer.from_config(config))
    copy_after_update_1(trainer, whole, stopped)
    trainer.train(whole)
    without_pictures(Trainer.from_config(config)).train(stopped, resume=True)
    assert_same_result(stopped, whole)


def test_evaluations_and_checkpoints_are_due_once_per_interval_and_at_the_end() -> None:
    trainer = object.__new__(Trainer)
    trainer.config, trainer.updates_per_rollout = small(updates=12), 2

    def due(every: int) -> list[int]:
        found = []
        for trainer.done in range(13):
            found += [trainer.done] * trainer._is_due(every)
        return found

    assert due(5) == [6, 10, 12]
    assert due(1) == [2, 4, 6, 8, 10, 12]
    assert due(0) == [12]


@pytest.mark.slow
def test_saved_lora_gives_the_same_images_in_plain_diffusers(tmp_path: Path) -> None:
    config = small(updates=2)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.05))
    trainer = without_pictures(Trainer.from_config(config))
    folder = tmp_path / "run"
    folder.mkdir()
    trainer.train(folder)
    ours = trainer.evaluator.images()
    with trainer.policy.pretrained_weights():
        pretrained = trainer.evaluator.images()

    pipe = StableDiffusionPipeline.from_pretrained(smallest("sd15"), dtype=torch.float32, safety_checker=None)
    pipe.load_lora_weights(folder / "lora")
    generators = [torch.Generator().manual_seed(seed_of(0, "evaluation", 0, i)) for i in range(4)]
    theirs = pipe(
        trainer.evaluator.prompts,
        num_inference_steps=4,
        guidance_scale=3.0,
        eta=1.0,
        generator=generators,
        output_type="pt",
    ).images
    # Float32 rounding of two differently ordered samplers, through four steps and the decoder.
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours - pretrained).abs().max() > 50 * 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("reward_gradient", "flow"), [("lookahead_detached", "unet"), ("terminal", "none")])
def test_other_settings_run_with_the_planned_passes(reward_gradient: str, flow: str, tmp_path: Path) -> None:
    base = small(updates=2)
    objective = Objective(reward_gradient=reward_gradient, weighting="sigma")
    config = dataclasses.replace(base, objective=objective, flow=dataclasses.replace(base.flow, kind=flow))
    folder = train(config, tmp_path / "run")
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    assert (record["passes_inner"], record["passes_last"]) == planned_passes(objective, flow != "none")


@pytest.mark.slow
def test_bfloat16_networks_train_a_float32_lora(tmp_path: Path) -> None:
    config = small(
        updates=2,
        model=ModelConfig(name="testbed", dtype="bfloat16", height=16, width=16),
        reward=RewardConfig(terms=("hue=1",)),
        evaluation=EvaluationConfig(every=2, samples=2, prompts=2),
    )
    trainer = Trainer.from_config(config)
    assert trainer.policy.network.dtype == torch.bfloat16
    folder = tmp_path / "run"
    folder.mkdir()
    without_pictures(trainer).train(folder)
    weights = load_file(folder / "lora/pytorch_lora_weights.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name or "lora.up" in name)


@pytest.mark.slow
def test_other_sampler_runs(tmp_path: Path) -> None:
    train(
        small(updates=2, sampler=SamplerConfig(steps=4, scheduler="sde-dpmsolver++", guidance_scale=1)),
        tmp_path / "run",
    )


@pytest.mark.slow
def test_outputs_in_8_bits_touch_the_trust_region_alone(run: Path, tmp_path: Path) -> None:
    """The first update of a rollout has the policy that sampled: all of its trust region is rounding, a share of it
    within (1/254)² of the outputs' squares, which are about 1."""
    memory = dataclasses.replace(small().memory, output_block=64, buffer="pinned")
    folder = train(small(memory=memory), tmp_path / "run")
    plain, rounded = (json.loads((path / "metrics.jsonl").read_text().splitlines()[1]) for path in (run, folder))
    kappa = small().objective.trust_region_weight
    assert 0 < rounded["loss_trust_region"] < kappa * 4 / 254**2
    others = plain.keys() - {"loss", "loss_trust_region", "grad_norm_lora", "trust_floor"}
    assert {name: rounded[name] for name in others} == {name: plain[name] for name in others}


@pytest.mark.slow
def test_batch_sizes_do_not_change_the_first_update(run: Path, tmp_path: Path) -> None:
    base = small(updates=2)
    changed = dataclasses.replace(
        base,
        rollout=dataclasses.replace(base.rollout, batch=3),
        memory=dataclasses.replace(base.memory, micro_batch=1, decode_chunk=1),
    )
    folders = run, train(changed, tmp_path / "run")
    expected, found = (json.loads((path / "metrics.jsonl").read_text().splitlines()[1]) for path in folders)
    for name, value in expected.items():
        if isinstance(value, float):
            # Same noise and transitions; float32 sums in another order. The reverse residual amplifies it most.
            assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_kernels_do_not_change_the_run(backend: str, run: Path, tmp_path: Path) -> None:
    """Over the first of its rollouts."""
    through_kernels, trainer = tmp_path / "run", without_pictures(Trainer.from_config(small(backend=backend)))
    interrupt(trainer, 3)
    through_kernels.mkdir()
    with pytest.raises(KeyboardInterrupt):
        trainer.train(through_kernels)
    lines = [(folder / "metrics.jsonl").read_text().splitlines()[:4] for folder in (run, through_kernels)]
    for plain, fused in zip(*([json.loads(line) for line in part] for part in lines), strict=True):
        assert plain.keys() == fused.keys()
        for name, value in plain.items():
            close = pytest.approx(value, rel=2e-3, abs=1e-6) if isinstance(value, float) else value
            assert fused[name] == close, name


@pytest.mark.slow
def test_a_tiny_decoder_guides_and_the_vae_reports(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = (8,)
    blocks = {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths}
    counts = {"num_encoder_blocks": (1,), "num_decoder_blocks": (1,)}
    AutoencoderTiny(**blocks, **counts).save_pretrained(tmp_path / "tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    model = dataclasses.replace(small().model, tiny_decoder="~/tiny")
    folder = train(
        small(model=model, updates=2, evaluation=dataclasses.replace(small().evaluation, every=0)), tmp_path / "run"
    )
    first, others = (json.loads((f / "metrics.jsonl").read_text().splitlines()[1]) for f in (folder, run))
    assert first["rollout_reward"] == pytest.approx(others["rollout_reward"], rel=1e-5)
    assert first["norm_reward"] != pytest.approx(others["norm_reward"], rel=0.01)


def test_a_tiny_decoder_that_is_not_there() -> None:
    model = dataclasses.replace(small().model, tiny_decoder="no/such/decoder")
    with pytest.raises(ValueError, match=r"model\.tiny_decoder = 'no/such/decoder'"):
        Trainer.from_config(small(model=model))


@pytest.mark.slow
def test_stopped_between_a_rollout_and_its_first_update(run: Path, tmp_path: Path) -> None:
    """The rollout is saved with the checkpoint, and the resumed run does not sample it again."""
    config, stop, sampled = small(checkpoint_every=100), StopSignals(), []
    folder = tmp_path / "run"
    trainer = without_pictures(Trainer.from_config(config))
    observe = trainer.components.reward.observe

    def stopping(values) -> None:
        observe(values)
        sampled.append(values)
        if len(sampled) == 2:
            stop.received = signal.SIGTERM

    trainer.components.reward.observe = stopping
    folder.mkdir()
    with pytest.raises(Stopped):
        trainer.train(folder, stop=stop)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["update-000002"]
    resumed = without_pictures(Trainer.from_config(config))
    resumed.source.rollout = lambda number: pytest.fail("a rollout is sampled again")
    resumed.train(folder, resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
