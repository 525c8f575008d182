"""The state of a run between two updates: written atomically, so that a run can be killed at any instant.

All randomness is a function of the seed and the update, so this is everything: LoRA, flow network, optimizer, count.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from fastnabla.optim import Optimizer
from fastnabla.policy import ADAPTER, Policy

FILE = "checkpoint.pt"


def save_checkpoint(folder: Path, update: int, policy: Policy, flow: nn.Module | None, optimizer: Optimizer) -> None:
    """Replace the checkpoint in `folder` by the state after `update` updates."""
    state = {
        "update": update,
        "lora": get_peft_model_state_dict(policy.unet, adapter_name=ADAPTER),
        "flow": flow.state_dict() if flow is not None else {},
        "optimizer": optimizer.adamw.state_dict(),
        "schedule": optimizer.schedule.state_dict(),
    }
    partial = folder / (FILE + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / FILE)


def load_checkpoint(folder: Path, policy: Policy, flow: nn.Module | None, optimizer: Optimizer) -> int:
    """Restore the state in `folder`; the number of updates it had seen (0 if there is no checkpoint yet).

    Raises:
        ValueError: the file cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return 0
    try:
        state: dict[str, Any] = torch.load(path, map_location=policy.conditions.device, weights_only=True)
    except Exception as error:
        raise ValueError(f"resume = {str(folder)!r}: {FILE} cannot be read ({error}).") from error
    set_peft_model_state_dict(policy.unet, state["lora"], adapter_name=ADAPTER)
    if flow is not None:
        flow.load_state_dict(state["flow"])
    optimizer.adamw.load_state_dict(state["optimizer"])
    optimizer.schedule.load_state_dict(state["schedule"])
    return state["update"]


def read_records(path: Path, update: int) -> list[dict[str, Any]]:
    """The records of a JSON-lines file up to `update`; what came after (or was cut off) is removed from the file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["update"] > update:
            break
        records.append(record)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(path)
    return records
