"""Updates that are not finite, written in a run and computed again from what was written."""

import dataclasses
import functools
import importlib
import shutil
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from fastnabla import reproduce, train
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import ComputeConfig, OptimizerConfig
from fastnabla.debug import anomaly
from fastnabla.debug.anomaly import Anomalies
from fastnabla.distributed.world import World
from fastnabla.prompts import RunPrompts
from fastnabla.rewards import build_reward
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.sources import Trajectories
from fastnabla.trajectories.transitions import LazyTransitions
from fastnabla.utils.durable import verify_folder
from tests import sharded
from tests.faults import tiny
from tests.integration.test_extending import QUICK
from tests.ranks import on_ranks
from tests.runs import small, without_pictures
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


@pytest.mark.slow
def test_what_a_run_skipped_is_found_from_the_folder_alone(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(Trainer, "_write_pictures", lambda *_: None)
    monkeypatch.setattr(anomaly, "FILE_BYTES", 2**16)
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
    assert_split(Path("elsewhere"), 2**16)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_an_update_of_a_gpu_is_computed_on_a_cpu(device: Literal["cpu", "auto"]) -> None:
    config = dataclasses.replace(
        small(),
        device="cuda",
        backend="triton",
        compute=ComputeConfig(compile="blocks", attention="xformers"),
        optimizer=OptimizerConfig(name="paged_adamw8bit"),
    )
    Trainer.from_config(reproduce.plain(config, device))
    with pytest.raises(ValueError, match="device = 'cuda'"):
        Trainer.from_config(reproduce.plain(config, "cuda"))


def assert_split(folder: Path, most: int) -> None:
    """Several files, each with no more bytes of tensors than `most`, or with a single tensor."""
    files = [load_file(path).values() for path in folder.glob("*.safetensors")]
    assert len(files) > 2
    assert all(len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= most for tensors in files)


def test_a_folder_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main([str(tmp_path)]) == 2
    assert "is not a folder that --dump-anomalies wrote" in " ".join(capsys.readouterr().err.split())


def anomalies(trainer: Trainer) -> Anomalies:
    return trainer.components.anomalies


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.grad.clone() for group in trainer.optimizer.groups.values() for parameter in group]


CONFIGS = {
    "residual-db": dataclasses.replace(tiny(), objective=dataclasses.replace(tiny().objective, reverse_fraction=0.5)),
    "ddpo": dataclasses.replace(tiny(), method="ddpo"),
    "refl": dataclasses.replace(tiny(), method="refl"),
}


@pytest.mark.slow
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


@pytest.mark.slow
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


ROWS = [torch.tensor([0, 1, 2, 7]), torch.tensor([3, 4, 5, 6, 8, 9])]
"""Transitions of each of two ranks."""
SEEDS = list(range(2**62, 2**62 + 10))


def write(world: World, run: sharded.Run, folder: Path, number: int, selection: LazyTransitions | Trajectories) -> None:
    writer = Anomalies(policy=run.policy, flow=run.step.flow, reward=build_reward(["area"]), step=run.step, world=world)
    writer.write(folder, number, selection, {}, tiny(), RunPrompts(texts=["a"] * 4, trained=2, evaluated=range(2, 4)))


def write_on_rank(folder: Path, world: World) -> list[int]:
    """Write an update of full finetuning with sharded weights, and one of a method that samples in its step."""
    run, rows = sharded.build(world), ROWS[world.rank]
    batch = dataclasses.replace(sharded.transitions(0)[rows], trajectory=torch.arange(len(rows)))
    write(world, run, folder, 2, batch.select())
    write(world, run, folder, 3, Trajectories(prompt=torch.arange(10), noise=SEEDS, draws=SEEDS[::-1], shared=7)[rows])
    return []


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_one_process_computes_again_what_two_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anomaly, "FILE_BYTES", 2**16)
    on_ranks(tmp_path / "ranks", 2, functools.partial(write_on_rank, tmp_path))
    run, order = sharded.build(), torch.cat(ROWS)
    run.step(sharded.transitions(0)[order])
    expected = [parameter.grad for parameter in run.step.parameters]
    with torch.no_grad():
        for parameter in run.step.parameters:
            parameter.zero_()
            parameter.grad = None
    reader = Anomalies(policy=run.policy, flow=run.step.flow, reward=build_reward(["area"]), step=run.step)
    folder = tmp_path / "anomalies"
    assert_split(folder / "update-000002", 2**16)
    _, batch = reader.restore(folder / "update-000002")
    assert len(batch.trajectory.unique()) == 10
    run.step(batch)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(run.step.parameters, expected, strict=True))
    _, batch = reader.restore(folder / "update-000003")
    order = order.tolist()
    assert batch.noise == [SEEDS[i] for i in order] and batch.draws == [SEEDS[9 - i] for i in order]
    assert batch.prompt.tolist() == order and batch.shared == 7
