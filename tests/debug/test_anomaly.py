"""Updates that are not finite, written in a run and computed again from what was written."""

import dataclasses
import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastnabla import reproduce, train
from fastnabla.config.train import TrainConfig
from fastnabla.debug import anomaly
from fastnabla.debug.anomaly import Anomalies
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.transitions import Transitions
from fastnabla.utils.durable import verify_folder
from tests.faults import tiny, without_pictures
from tests.integration.test_extending import QUICK
from tests.tokens import TOKENS, assert_no_tokens
from tests.training.test_guards import spoil

# Finite itself, but √ has no derivative at 0; and not for the first and last prompt, which the check before a run tries.
FAULTY = """
import torch
def reward(images, prompts):
    dog = torch.tensor(["dog" in prompt for prompt in prompts])
    nothing = (images - images.detach()).square().sum((1, 2, 3))
    return images.mean((1, 2, 3)) + torch.where(dog, nothing, 1.0).sqrt()
"""


def test_what_a_run_skipped_is_found_from_the_folder_alone(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(Trainer, "_write_pictures", lambda *_: None)
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)
    Path("faulty.py").write_text(FAULTY)
    Path("prompts.txt").write_text("a cat\na dog\na cow\n")
    command = [
        *QUICK,
        "--tracker=tensorboard",
        "--rollout.trajectories=3",
        "--prompts.source=prompts.txt",
        "--reward.terms=faulty:reward",
    ]
    assert train.main([*command, "--run=run", "--updates=1", "--evaluation.every=0", "--dump-anomalies"]) == 0
    assert_no_tokens(tmp_path, caplog.text, *capsys.readouterr())
    said = caplog.text.partition("update 1 is skipped (1 in a row). Not finite: ")[2].splitlines()[0]
    assert "norm_reward" in said and "of a sample for 'a dog'" in said and "'a cat'" not in said
    assert "python -m fastnabla.reproduce run/anomalies/update-000001" in caplog.text
    shutil.copytree("run/anomalies/update-000001", "elsewhere")
    shutil.rmtree("run")
    Path("prompts.txt").unlink()
    assert reproduce.main(["elsewhere"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "update 1: computed on cpu by the run, and on cpu now" in printed
    assert "first not finite: gradient of reward 'faulty:reward' in an image for 'a dog'" in printed
    assert "'a cat'" not in printed
    assert said in printed
    assert "gradients that are not finite: policy" in printed
    # √'s is ∞, and that of the square before it 0 · ∞.
    assert "'PowBackward0' returned nan" in printed and "faulty.py" in printed and ".square()" in printed

    # The same transitions with a reward that is right: all is finite.
    monkeypatch.delitem(sys.modules, "faulty")
    Path("faulty.py").write_text(FAULTY.replace(".sqrt()", "") + "# mended\n")
    importlib.invalidate_caches()
    assert reproduce.main(["elsewhere"]) == 1
    assert "everything is finite here" in capsys.readouterr().out


def test_a_folder_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main([str(tmp_path)]) == 2
    assert "is not a folder that --dump-anomalies wrote" in " ".join(capsys.readouterr().err.split())


def anomalies(trainer: Trainer) -> Anomalies:
    return trainer.components.anomalies


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.grad.clone() for group in trainer.optimizer.groups.values() for parameter in group]


CONFIGS = {
    "residual-db": tiny(),
    "ddpo": dataclasses.replace(tiny(), method="ddpo"),
    "refl": dataclasses.replace(tiny(), method="refl"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_update_is_computed_again_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound one, so that its gradients can be compared; weights, statistics and micro-batch are changed in between. The
    file has a field of earlier versions, too."""
    gathered = anomaly._gathered
    older = {"transitions.epoch": torch.zeros(3, dtype=torch.int64)}
    monkeypatch.setattr(anomaly, "_gathered", lambda *arguments: gathered(*arguments) | older)
    config: TrainConfig = CONFIGS[name]
    first, second = Trainer.from_config(config), Trainer.from_config(config)
    with torch.no_grad():
        for i, parameter in enumerate(first.policy.trainable()):
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    first.step.micro_batch = 3
    rollout = first.source.collect(0)
    selection = first.source.select(0, torch.arange(config.rollout.trajectories))
    before = anomalies(first).before()
    report = first.step(selection)
    anomalies(first).write(tmp_path, 5, selection, before, config, first.prompts)
    facts, batch = anomalies(second).restore(tmp_path / "anomalies" / "update-000005")
    assert (
        facts["update"] == 5 and second.step.micro_batch == 3 and second.step.update == 4 and isinstance(rollout, dict)
    )
    again = second.step(batch)
    assert torch.equal(report.losses["loss"], again.losses["loss"])
    assert all(map(torch.equal, gradients(first), gradients(second)))
    assert any(gradient.any() for gradient in gradients(first))


def test_the_first_few_are_written_and_the_run_is_the_same(tmp_path: Path) -> None:
    """Updates 2 to 5 of 6 are skipped, and the first three written; written or not, the run is the same."""
    results = []
    for dump in (False, True):
        run = tmp_path / str(dump)
        run.mkdir()
        trainer = without_pictures(Trainer.from_config(dataclasses.replace(tiny(), dump_anomalies=dump)))
        spoil(trainer, [2, 3, 4, 5])
        trainer.train(run)
        results.append((run / "metrics.jsonl").read_bytes())
        written = sorted(path.name for path in (run / "anomalies").glob("*"))
        assert written == ["update-000002", "update-000003", "update-000004"] * dump
    assert results[0] == results[1]
    assert set(verify_folder(tmp_path / "True" / "anomalies" / "update-000003")["files"]) == {
        "update.safetensors",
        "config.json",
        "prompts.json",
    }


class Few:
    """Of a policy and a step, what is written."""

    conditions, micro_batch = torch.zeros(1), 2

    def trained(self) -> dict[str, nn.Parameter]:
        return {"weight": nn.Parameter(torch.zeros(100))}

    def state_dict(self) -> dict:
        return {}


def test_a_large_one_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = dict.fromkeys(("step_index", "prompt", "trajectory"), torch.zeros(3, dtype=torch.int64))
    states = dict.fromkeys(("x", "x_next", "model_output"), torch.zeros(3, 1, 2, 2))
    batch = Transitions(**states, **numbers, reward=torch.zeros(3))
    writer = Anomalies(policy=Few(), flow=None, reward=Few(), step=Few())
    size = 400 + 3 * 3 * 8 + 3 * 3 * 16 + 12
    config, prompts = tiny(), Trainer.from_config(tiny()).prompts
    for most, update in ((size - 1, 1), (size, 2)):
        monkeypatch.setattr(anomaly, "MAX_BYTES", most)
        writer.write(tmp_path, update, batch.select(), {}, config, prompts)
    assert f"update 1 is not written: it has {size} bytes" in caplog.text
    assert [path.name for path in (tmp_path / "anomalies").iterdir()] == ["update-000002"]
