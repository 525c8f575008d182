"""Writes an update that is not finite into a folder. `fastnabla.reproduce` can compute it again from there, on any machine.

RUN/anomalies/update-000003/ holds everything that the update was computed from: its transitions (for a method that samples in
its step, the prompts and seeds of its trajectories), the trained weights before it, and the run's configuration and prompts.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastnabla.config.train import TrainConfig, to_json
from fastnabla.methods.accumulation import Accumulation
from fastnabla.models.policy import Policy
from fastnabla.prompts import RunPrompts
from fastnabla.rewards import RewardSum
from fastnabla.trajectories.sources import Trajectories
from fastnabla.trajectories.transitions import LazyTransitions, Transitions
from fastnabla.utils.durable import DamagedError, Write, verify_folder, write_folder
from fastnabla.utils.safetensors_file import read_tensors
from fastnabla.utils.same_tensors import require_same_tensors

logger = logging.getLogger("fastnabla")

FOLDER, TENSORS = "anomalies", "update.safetensors"
MAX_UPDATES = 3
"""A run writes at most this many updates, the first ones."""
MAX_BYTES = 2 * 2**30
"""A larger update is not written."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Anomalies:
    """Writes a run's updates that are not finite, and reads them back.

    Args:
        policy, flow, reward, step: the run's.
    """

    policy: Policy
    flow: nn.Module | None
    reward: RewardSum
    step: Accumulation

    def before(self) -> dict[str, Tensor]:
        """A copy of the step's state. `write` needs the one from before the step was called."""
        return {f"step.{name}": value.detach().cpu().clone() for name, value in self.step.state_dict().items()}

    def write(
        self,
        run: Path,
        update: int,
        selection: LazyTransitions | Trajectories,
        before: dict[str, Tensor],
        config: TrainConfig,
        prompts: RunPrompts,
    ) -> None:
        """Write the update, if it is one of the run's first `MAX_UPDATES` and not larger than `MAX_BYTES`.

        Args:
            run: the run folder.
            update: number of the update. It was skipped, so the weights are those before it.
            selection: the input of the step.
            before: from `before`.
            config, prompts: the run's.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = run / FOLDER / f"update-{update:06d}"
        if len({*(path.name for path in folder.parent.glob("update-*")), folder.name}) > MAX_UPDATES:
            return
        facts: dict[str, Any] = {"update": update, "device": self.policy.conditions.device.type}
        facts |= {"micro_batch": self.step.micro_batch, "reward": self.reward.state_dict()}
        tensors = before | {f"policy.{name}": weight.detach() for name, weight in self.policy.trained().items()}
        if self.flow is not None:
            tensors |= {f"flow.{name}": value for name, value in self.flow.state_dict().items()}
        if isinstance(selection, Trajectories):
            names = ("noise", "draws", "shared")
            facts["trajectories"] = {name: getattr(selection, name) for name in names}
            tensors["trajectories.prompt"] = selection.prompt
        else:
            tensors |= _gathered(selection, self.step.micro_batch)
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        size = sum(value.nbytes for value in tensors.values())
        if size > MAX_BYTES:
            logger.warning(
                "update %d is not written: it has %s bytes; the limit is %s", update, f"{size:,}", f"{MAX_BYTES:,}"
            )
            return
        contents = {
            TENSORS: save(tensors),
            "config.json": to_json(config).encode(),
            "prompts.json": prompts.to_json().encode(),
        }
        write_folder(folder, {name: _writer(content) for name, content in contents.items()}, facts)
        logger.warning("to find out why update %d is not finite: python -m fastnabla.reproduce %s", update, folder)

    @torch.no_grad()
    def restore(self, folder: Path) -> tuple[dict[str, Any], Transitions | Trajectories]:
        """Restore the state that `write` wrote into `folder`.

        Returns:
            The facts in the folder's manifest, and the input of the step.

        Raises:
            ValueError: the folder is damaged, or belongs to another configuration.
        """
        facts = read_facts(folder)
        tensors = read_tensors(folder / TENSORS, self.policy.conditions.device)
        try:
            return facts, self._restored(facts, tensors)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{str(folder)!r} does not fit its own config.json ({error}).") from error

    def _restored(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Transitions | Trajectories:
        """The input of the step, after restoring the state."""
        names = ("policy", "flow", "step", "transitions", "trajectories")
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        trained = self.policy.trained()
        require_same_tensors(parts["policy"], trained)
        for name, parameter in trained.items():
            parameter.copy_(parts["policy"][name])
        if self.flow is not None:
            self.flow.load_state_dict(parts["flow"])
        self.step.load_state_dict(parts["step"])
        self.reward.load_state_dict(facts["reward"])
        self.step.micro_batch, self.step.update = facts["micro_batch"], facts["update"] - 1
        prompt = parts["trajectories" if "trajectories" in facts else "transitions"]["prompt"].cpu()
        self.policy.conditions.ensure(prompt)
        if "trajectories" in facts:
            return Trajectories(prompt=prompt, **facts["trajectories"])
        names = [field.name for field in dataclasses.fields(Transitions)]  # earlier versions wrote more
        return Transitions(**{name: parts["transitions"][name] for name in names})


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts in the manifest of an update's folder.

    Raises:
        ValueError: the folder is not one that `Anomalies.write` wrote, or it is damaged.
    """
    try:
        return verify_folder(folder)
    except DamagedError as error:
        raise ValueError(
            f"{str(folder)!r} is not a folder that --dump-anomalies wrote, or it is damaged: {error}."
        ) from error


def _gathered(selection: LazyTransitions, size: int) -> dict[str, Tensor]:
    """All transitions, copied to the host `size` at a time."""
    parts = [selection.gather(rows) for rows in torch.arange(len(selection)).split(size)]
    return {
        f"transitions.{field.name}": torch.cat([getattr(part, field.name).cpu() for part in parts])
        for field in dataclasses.fields(Transitions)
    }


def _writer(content: bytes) -> Write:
    def write(file: BinaryIO) -> None:
        file.write(content)

    return write
