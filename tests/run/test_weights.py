"""Which weights a run folder has, of which evaluation."""

import errno
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastnabla.run.save_weights import write_weights
from fastnabla.run.weights import is_best, update_of, weights_folder
from fastnabla.training import trainer as trainer_module
from fastnabla.training.trainer import Trainer
from tests.integration.failing_disk import FailingDisk
from tests.runs import small

LORA = Path("lora") / "pytorch_lora_weights.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rewards", "kept"), [([3.0, 2.0, 1.0], 1), ([float("nan"), 2.0, 1.0], 2)], ids=["first", "NaN, then second"]
)
def test_the_best_evaluation_s_weights_are_kept(
    rewards: list[float], kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations after updates 2, 4 and 6; the pretrained model's reward, 9, does not count."""
    trainer, given, written = Trainer.from_config(small(updates=6)), iter([9.0, *rewards]), []
    measure = trainer.evaluator.measure
    trainer.evaluator.measure = lambda images: measure(images) | {"reward": next(given)}
    trainer._write_pictures = lambda *_: None

    def watched(run: Path, *arguments) -> None:
        write_weights(run, *arguments)
        written.append(load_file(run / LORA))

    monkeypatch.setattr(trainer_module, "write_weights", watched)
    trainer.train(tmp_path)
    best, last = load_file(tmp_path / "best" / LORA), load_file(tmp_path / LORA)
    assert all(weight.equal(written[kept - 1][name]) for name, weight in best.items()) and best.keys() == last.keys()
    assert all(weight.equal(written[-1][name]) for name, weight in last.items())
    assert any(not weight.equal(last[name]) for name, weight in best.items())


def test_a_full_disk_is_told_as_any_other(tmp_path: Path) -> None:
    """safetensors has an error of its own for it, and so has shutil.copytree: wherever it is full, errno says so."""
    trainer, operations = Trainer.from_config(small()), 0
    while True:
        disk = FailingDisk(tmp_path, operations, errno.ENOSPC)
        try:
            with disk.patched():
                write_weights(tmp_path, trainer.policy, None, True, True)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
        operations += 1
    assert operations > 5 and (tmp_path / "best" / LORA).is_file()


def test_the_first_evaluation_after_an_update_is_the_best_so_far() -> None:
    pretrained = {"phase": "evaluate", "update": 0, "reward": 5.0}
    assert is_best(1.0, [pretrained, {"phase": "train", "update": 1}])
    assert not is_best(1.0, [pretrained, {"phase": "evaluate", "update": 2, "reward": 1.0}])
    assert is_best(1.0, [{"phase": "evaluate", "update": 2, "reward": None}])


def test_folders_by_name() -> None:
    run = Path("run")
    assert weights_folder(run, "raw", None) == run and weights_folder(run, "best", None) == run / "best"
    assert weights_folder(run, "ema", 0.9) == run / "ema"
    with pytest.raises(ValueError, match=r"weights = 'ema'.*without optimizer\.ema; use raw"):
        weights_folder(run, "ema", None)


def test_the_update_of_weights() -> None:
    rewards = [(0, 9.0), (2, None), (4, 3.0), (6, 2.0)]
    records = [{"phase": "evaluate", "update": update, "reward": reward} for update, reward in rewards]
    records.append({"phase": "train", "update": 7})
    assert [update_of(weights, records) for weights in ("raw", "ema", "best")] == [6, 6, 4]
    assert update_of("best", records[:2]) == 2 and update_of("raw", records[:1]) is None
