"""The resumable stages of the testbeds' training."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastnabla.testbed.stages import PretrainConfig, run_stage, seeded


class Interrupted(Exception):
    pass


def stage(folder: Path, until: int | None = None) -> dict[str, Tensor]:
    """The weights and their average after a stage of 7 steps, which is interrupted at step `until`."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def loss_of_step(step: int) -> Tensor:
        if step == until:
            raise Interrupted
        return module(torch.randn(4, 3, generator=seeded(0, step))).square().mean()

    run_stage("linear", PretrainConfig(output=folder, checkpoint_every=2), module, 7, 0.1, loss_of_step, ema)
    return {**module.state_dict(prefix="last."), **ema.module.state_dict(prefix="average.")}


@pytest.mark.parametrize("until", [1, 4, 5])
def test_an_interrupted_stage_ends_with_the_same_weights(tmp_path: Path, until: int) -> None:
    whole = stage(tmp_path / "whole")
    with pytest.raises(Interrupted):
        stage(tmp_path / "parts", until)
    resumed = stage(tmp_path / "parts")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    assert not torch.equal(whole["last.weight"], whole["average.weight"])


def test_draws_depend_on_every_part_of_the_key() -> None:
    keys = [(0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 1, 1)]
    draws = {torch.rand(2, generator=seeded(*key)).sum().item() for key in keys}
    assert len(draws) == len(keys)
    assert torch.equal(torch.rand(2, generator=seeded(3, 4)), torch.rand(2, generator=seeded(3, 4)))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    stage(tmp_path)
    module = nn.Linear(3, 1)
    for other in ({"seed": 1}, {"copies": 1}, {"limit": 5}):
        config = PretrainConfig(output=tmp_path, **other)
        with pytest.raises(ValueError, match=r"linear\.checkpoint is of other settings"):
            run_stage("linear", config, module, 7, 0.1, lambda step: module.weight.sum())
    with pytest.raises(ValueError, match=r"linear\.checkpoint is of other settings"):
        run_stage("linear", PretrainConfig(output=tmp_path), module, 8, 0.1, lambda step: module.weight.sum())
    with pytest.raises(ValueError, match="checkpoint_every = 0: must be at least 1"):
        PretrainConfig(checkpoint_every=0)
