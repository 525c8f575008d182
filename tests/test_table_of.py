"""The loss takes a scheduler of diffusers in the place of a table, and makes its table once."""

import dataclasses

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastnabla import transition
from fastnabla.losses import residual_db_loss
from fastnabla.transition import TransitionTable, table_of
from tests.checks import ddim, ddim_table
from tests.loss_arguments import arguments


def test_scheduler_or_table():
    held = arguments(5.0)
    for eta in (None, 0.6):
        table = residual_db_loss(**{**held, "scheduler": ddim_table(eta=eta or 1.0)}, guidance_scale=5.0, beta=3.0)
        scheduler = residual_db_loss(**{**held, "scheduler": ddim(10)}, guidance_scale=5.0, beta=3.0, eta=eta)
        assert table.loss == scheduler.loss


class Operations(TorchDispatchMode):
    """Names of the operations within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def test_a_scheduler_becomes_a_table_once(monkeypatch):
    """Until its timesteps, its configuration or η change, whatever the device; and no longer than it lives."""
    scheduler = ddim(10)
    held = arguments(5.0) | {"scheduler": scheduler}
    built, build = [], TransitionTable.from_scheduler
    monkeypatch.setattr(
        TransitionTable, "from_scheduler", lambda *args, **kwargs: built.append(1) or build(*args, **kwargs)
    )
    operations = []
    for _ in range(3):
        with Operations() as seen:
            residual_db_loss(**held, guidance_scale=5.0, beta=3.0)
        operations.append(seen.names)
    assert len(built) == 1 and len(operations[0]) > len(operations[1]) and operations[1] == operations[2]
    table = table_of(scheduler, 1.0)
    with Operations() as seen:
        assert table_of(scheduler, 1.0) is table
    assert seen.names == [] and len(built) == 1

    assert table_of(scheduler, 0.5).sigma[0] == 0.5 * table.sigma[0] and len(built) == 2
    scheduler.set_timesteps(20)
    assert len(table_of(scheduler, 0.5)) == 20 and len(built) == 3
    scheduler.timesteps += 1  # in place
    assert table_of(scheduler, 0.5).timestep[-1] == 2 and len(built) == 4
    scheduler.timesteps -= 1
    scheduler.register_to_config(prediction_type="v_prediction")
    assert table_of(scheduler, 1.0).d[0] != table.d[0] and len(built) == 5
    other = ddim(10)
    assert table_of(other, 1.0) is not table_of(ddim(10), 1.0) and len(built) == 7
    kept = len(transition._TABLES)
    del other
    assert len(transition._TABLES) == kept - 1
    with torch.inference_mode():
        scheduler.set_timesteps(10)
    assert table_of(scheduler, 1.0) is table_of(scheduler, 1.0) and len(built) == 8


def test_a_table_goes_to_a_device_in_two_copies():
    """And is not looked at there, which would wait for the device: the meta device has nothing to look at."""
    table = ddim_table()
    with Operations() as seen:
        moved = table.to("meta")
    assert seen.names.count("_to_copy") == 2
    assert {getattr(moved, field.name).dtype for field in dataclasses.fields(moved)} == {torch.float32, torch.float64}
    with Operations() as seen:
        assert table.to("meta") is moved
    assert seen.names == []
