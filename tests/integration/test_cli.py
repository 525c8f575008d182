"""The command lines as a user meets them."""

import importlib
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from fastnabla import evaluate, sample, train
from fastnabla.distributed.signals import Stopped
from fastnabla.run.tracker import Tracker
from fastnabla.training.trainer import Trainer
from fastnabla.training.whole_run import DIVERGED
from tests.runs import ON_SMALLEST
from tests.tokens import TOKENS, assert_no_tokens
from tests.utils.test_durable import no_space

TESTBED = [
    "--updates=1",
    "--tracker=none",
    "--sampler.steps=4",
    "--rollout.trajectories=2",
    "--rollout.fraction=0.5",
    "--evaluation.samples=2",
    "--evaluation.prompts=2",
]
QUICK = [*TESTBED, *ON_SMALLEST]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are in the environment."""
    monkeypatch.chdir(tmp_path)
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)


def test_train_then_sample(capsys: pytest.CaptureFixture[str], drawn: None) -> None:
    table = Path("animals.csv")
    table.write_text("Prompts,Place\na cow,field\na dog,house\na bear,wood\n", encoding="utf-8")
    assert train.main([*TESTBED, "--prompts.source", str(table)]) == 0
    run = Path("runs/testbed-001")
    assert (run / "table.md").is_file()
    assert sample.main([str(run), "--prompt", "a giraffe", "a cow", "-n", "3"]) == 0
    with Image.open(run / "sample.png") as picture:
        assert picture.width > 100
    assert train.main([*QUICK, "--run", str(run)]) == 2
    printed = capsys.readouterr()
    assert "exists already" in printed.err
    look = "prompts to train on: 3; evaluated: 2 of them\n  a cow\n  a dog\n  a bear\n  longest, 6 characters: a bear\n"
    assert printed.out.count(look) == 1
    table.unlink()  # a run keeps its prompts
    assert train.main(["--resume", str(run)]) == 0
    assert look in capsys.readouterr().out
    assert not Path("runs/testbed-002").exists()


@pytest.mark.slow
def test_sampler_s_last_steps_are_those_of_training() -> None:
    """`fastnabla.sample` starts at the timestep at which training did."""
    assert train.main([*QUICK, "--sampler.spacing", "trailing", "--sampler.min-sigma", "0.1"]) == 0
    seen = []
    forward = UNet2DConditionModel.forward

    def record(unet: UNet2DConditionModel, x: torch.Tensor, timestep: torch.Tensor, *others, **named):
        seen.append(int(timestep))
        return forward(unet, x, timestep, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "forward", record)
        assert sample.main(["runs/tiny-sd15-001", "-n", "1"]) == 0
    assert seen == [999, 749, 499, 249] * 2  # pretrained and finetuned


@pytest.mark.slow
def test_dry_run_prints_configuration_and_cost_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert '"guidance_scale": 3.0' in printed and "prompts to train on: 10" in printed
    assert "training step" in printed and "243.2 × 4 + 76.8 × 3" in printed
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--model.name", "no/such/model"], "model.name"),
        (["--reward.terms", "beauty"], "reward.terms"),
        (["--prompts.source", "missing.txt"], "prompts.source"),
        (["--evaluation.probe", "nonsense"], "evaluation.probe"),
        (["--sampler.eta", "0"], "sampler.eta"),
        (["--sampler.spacing", "linspace"], "sampler.spacing"),
        (["--sampler.spacing", "trailing", "--sampler.steps", "30"], "sampler.spacing"),
        (["--sampler.min-sigma", "0"], "sampler.min_sigma"),
        (["--sampler.min-sigma", "1"], "min_sigma"),
        (["--sampler.min-sigma", "0.1", "--method", "db"], "sampler.min_sigma"),
        (["--rollout.fraction", "0.01"], "rollout.fraction"),
        (["--rollout.fraction", "0.15"], "rollout.fraction"),
        (["--rollout.updates", "3"], "rollout.updates"),
        (["--objective.beta", "-1"], "objective.beta"),
        (["--objective.trust-region-weight", "nan"], "objective.trust_region_weight"),
        (["--resume", "missing"], "missing"),
        (["--resume", "auto"], "resume"),
        (["--checkpoint-keep", "0"], "checkpoint_keep"),
        (["--run", "."], "run"),
        (["--tracker", "wandb"], "tracker"),
        (["--prompts.column", "Text"], "prompts.source"),
        (["--prompts.template", "a photo"], "prompts.template"),
        (["--prompts.held-out", "0.001"], "prompts.held_out"),
        (["--prompts.held-out", "2"], "prompts.held_out"),
        (["--prompts.evaluation", "missing.txt"], "prompts.evaluation"),
        (
            [
                "--vram",
                "0.001",
                "--memory.micro-batch=1",
                "--memory.decode-chunk=1",
                "--memory.checkpoint-network=False",
            ],
            "vram",
        ),
        (["--vram", "-1"], "vram"),
        (["--model.random-init", "--seed=0"], "model.random_init"),
        (["--optimizer.name", "paged_adamw8bit"], "optimizer.name"),
        (["--compute.attention", "xformers"], "compute.attention"),
        (["--reward.clip", "0"], "reward.clip"),
    ],
    ids=lambda value: value[0].strip("-") + "=" + value[1] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_any_work(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert train.main(arguments) == 2
    except SystemExit as stop:
        assert stop.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert field in message and "Traceback" not in message
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_advice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "explosive.py").write_text(
        "def reward(i, p):\n    return i.mean((1, 2, 3)) * (1e30 if len(i) > 2 else 1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    explosive = [*QUICK, "--reward.terms", "explosive:reward", "--rollout.trajectories=3"]
    assert train.main([*explosive, "--max-skipped=1"]) == DIVERGED == 4
    message = " ".join(capsys.readouterr().err.split())
    assert "loss is not finite after update 1" in message
    assert "norm_reward" in message and "timestep" in message and "reward.clip" in message
    assert train.main(explosive) == 0  # one skipped update of at most five


MENDABLE = """
calls = 0
def reward(images, prompts):
    global calls
    calls += images.requires_grad
    values = images.mean((1, 2, 3))
    if calls == FAILS_AT:
        BREAK
    return values
"""
"""Call 1 is the check before the run; each update has one of its own."""
LAST_CALL = 3
"""Of the second update."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_", "found"),
    [
        ("raise KeyError('no such animal')", "failed on images"),
        ("values = values.detach()", "has no gradient"),
        ("values = values.sum()", "returned shape ()"),
    ],
)
def test_a_reward_that_breaks_is_named_and_can_be_mended(
    break_: str, found: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def use(fails_at: int) -> None:
        sys.modules.pop("mendable", None)
        importlib.invalidate_caches()
        source = MENDABLE.replace("FAILS_AT", str(fails_at)).replace("BREAK", break_)
        (tmp_path / f"mendable_{fails_at}").mkdir(exist_ok=True)
        (tmp_path / f"mendable_{fails_at}" / "mendable.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path / f"mendable_{fails_at}"))

    command = [*QUICK, "--reward.terms", "mendable:reward", "--checkpoint-every=1", "--rollout.updates=1"]
    command = [*command, "--updates=2"]
    use(LAST_CALL)
    assert train.main([*command, "--run", "broken"]) == 1
    printed = capsys.readouterr()
    message = " ".join(printed.err.split())
    assert_no_tokens(tmp_path, *printed)
    assert f"reward 'mendable:reward' {found}" in message and "--resume broken" in message
    assert [path.name for path in Path("broken/checkpoints").iterdir()] == ["update-000001"]
    assert ("KeyError" in message) == ("KeyError" in break_)
    if "KeyError" in break_:  # the others leave the same
        use(-1)
        assert train.main(["--resume", "broken"]) == 0
        use(-1)
        assert train.main([*command, "--run", "whole"]) == 0
        assert sys.modules["mendable"].calls == LAST_CALL
        assert Path("broken/metrics.jsonl").read_bytes() == Path("whole/metrics.jsonl").read_bytes()


def test_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", interrupt)
    assert train.main(QUICK) == 130
    assert "--resume runs/tiny-sd15-001" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_says_how_to_go_on(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_):
        raise Stopped(number)

    monkeypatch.setattr(Trainer, "train", stopped)
    assert train.main(QUICK) == 128 + number
    printed = capsys.readouterr().out
    assert number.name in printed and "--resume runs/tiny-sd15-001" in printed


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["checkpoint", "metrics"])
def test_a_full_disk_ends_the_run_with_advice(
    failing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if failing == "checkpoint":
        monkeypatch.setattr(torch, "save", no_space)
    else:
        monkeypatch.setattr(Tracker, "_append", no_space)
    assert train.main(QUICK) == 1
    message = capsys.readouterr().err
    assert "No space left" in message and "runs/tiny-sd15-001" in message and "Traceback" not in message


@pytest.mark.slow
def test_resume_auto_starts_and_then_continues(capsys: pytest.CaptureFixture[str]) -> None:
    command = [*QUICK, "--resume", "auto", "--run", "job/run"]
    assert train.main(command) == 0
    metrics = Path("job/run/metrics.jsonl").read_bytes()
    assert train.main([*command, "--checkpoint-every", "7"]) == 0
    assert "checkpoint_every = 7 is ignored: the run has 5" in capsys.readouterr().out
    assert Path("job/run/metrics.jsonl").read_bytes() == metrics
    assert train.main([*command, "--optimizer.learning-rate", "0.5", "--seed", "3"]) == 2
    message = capsys.readouterr().err
    assert "seed = 0, not 3" in message and "optimizer.learning_rate = 0.01, not 0.5" in message
    assert train.main(["--resume", "job/run"]) == 0


@pytest.mark.slow
def test_unknown_preset_is_refused() -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["sd99"])
    assert stop.value.code == 2


def test_sample_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(["nowhere"]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_evaluating_nothing_makes_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["nowhere"]) == 2
    assert "not a run folder" in capsys.readouterr().err and not Path("nowhere").exists()


def test_no_prompt_and_a_negative_seed_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--prompt"], "prompt = (): give one"), (["--seed=-1"], "seed = -1: must be at least 0")):
        with pytest.raises(SystemExit, match="2"):
            sample.main(["nowhere", *arguments])
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("scales", "named"), [(["nan"], "nan"), (["1", "inf"], r"1\.0 inf"), ([], r"\(\)")])
def test_scales_of_the_lora_are_finite(scales: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sample.main(["nowhere", "--lora-scale", *scales])
    assert re.search(f"lora_scale = {named}: give", " ".join(capsys.readouterr().err.split()))


@pytest.mark.slow
def test_a_plan_is_printed_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object) -> None:
        raise ValueError("loading starts here")

    monkeypatch.setattr("fastnabla.training.build.pipeline_of", load)
    assert train.main([*QUICK, "--vram", "4", "--memory.micro-batch", "2"]) == 2
    printed = capsys.readouterr()
    assert "memory plan for 4.0 GB" in printed.out
    assert "loading starts here" in printed.err
