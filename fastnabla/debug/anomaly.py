"""Writes an update that is not finite into a folder. `fastnabla.reproduce` can compute it again from there, on any machine.

RUN/anomalies/update-000003/ holds everything that the update was computed from: its transitions on all ranks (for a method that
samples in its step, the prompts and seeds of its trajectories), the trained weights before it, and the run's configuration and
prompts. Tensors are in safetensors files of limited size, so that the host never holds all of them at once.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save
from torch import Tensor, nn

from fastnabla.config.train import TrainConfig, to_json
from fastnabla.distributed.sharding import whole
from fastnabla.distributed.world import ALONE, World
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

FOLDER, SUFFIX = "anomalies", ".safetensors"
MAX_UPDATES = 3
"""A run writes at most this many updates, the first ones."""
FILE_BYTES = 2 * 2**30
"""Bytes of the tensors in one file. A larger tensor has a file of its own."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Anomalies:
    """Writes a run's updates that are not finite, and reads them back.

    Args:
        policy, flow, reward, step: the run's.
        world: the ranks. They write together, rank 0 into the folder.
    """

    policy: Policy
    flow: nn.Module | None
    reward: RewardSum
    step: Accumulation
    world: World = ALONE

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
        """Write the update, if it is one of the run's first `MAX_UPDATES`. Collective.

        Args:
            run: the run folder.
            update: number of the update. It was skipped, so the weights are those before it.
            selection: this rank's input of the step.
            before: from `before`.
            config, prompts: the run's.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = run / FOLDER / f"update-{update:06d}"
        if not self.world.broadcast(lambda: _is_among_first(folder)):
            return
        facts: dict[str, Any] = {"update": update, "device": self.policy.conditions.device.type}
        facts |= {"micro_batch": self.step.micro_batch, "reward": self.reward.state_dict()}
        tensors = before | {f"policy.{name}": weight.detach() for name, weight in self.policy.trained().items()}
        if self.flow is not None:
            tensors |= {f"flow.{name}": value for name, value in self.flow.state_dict().items()}
        if isinstance(selection, Trajectories):
            seeds = {name: torch.tensor(getattr(selection, name)) for name in ("noise", "draws")}
            facts["trajectories"] = {name: self.world.all_gather(of).tolist() for name, of in seeds.items()}
            facts["trajectories"]["shared"] = selection.shared
            tensors["trajectories.prompt"] = self.world.all_gather(selection.prompt)
        else:
            tensors |= _gathered(selection, self.step.micro_batch, self.world)
        contents = _files(tensors)
        if not self.world.is_main:
            for content in contents.values():
                content()  # sends this rank's part of sharded weights
            return
        contents |= {"config.json": to_json(config).encode, "prompts.json": prompts.to_json().encode}
        write_folder(folder, {name: _writer(content) for name, content in contents.items()}, facts)
        logger.warning("to find out why update %d is not finite: python -m fastnabla.reproduce %s", update, folder)

    @torch.no_grad()
    def restore(self, folder: Path) -> tuple[dict[str, Any], LazyTransitions | Trajectories]:
        """Restore the state that `write` wrote into `folder`.

        Returns:
            The facts in the folder's manifest, and the input of the step.

        Raises:
            ValueError: the folder is damaged, or belongs to another configuration.
        """
        facts = read_facts(folder)
        try:
            return facts, self._restored(folder, facts)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{str(folder)!r} does not fit its own config.json ({error}).") from error

    def _restored(self, folder: Path, facts: dict[str, Any]) -> LazyTransitions | Trajectories:
        """The input of the step, after restoring the state. Of the trained weights, which may be larger than the host's
        memory, one file is read at a time."""
        trained, device = self.policy.trained(), self.policy.conditions.device
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in ("flow", "step", "transitions", "trajectories")}
        missing = set(trained)
        for file in sorted(name for name in facts["files"] if name.endswith(SUFFIX)):
            for name, value in read_tensors(folder / file, device).items():
                part, _, rest = name.partition(".")
                if part == "policy":
                    require_same_tensors({rest: value}, {rest: trained[rest]})
                    trained[rest].copy_(value)
                    missing.discard(rest)
                else:
                    parts[part][rest] = value
        if missing:
            raise KeyError(min(missing))
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
        transitions = Transitions(**{name: parts["transitions"][name] for name in names}).select()
        factor = parts["transitions"].get("reverse_factor")
        return dataclasses.replace(transitions, reverse_factor=None if factor is None else factor.cpu())


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


def _is_among_first(folder: Path) -> bool:
    return len({*(path.name for path in folder.parent.glob("update-*")), folder.name}) <= MAX_UPDATES


def _gathered(selection: LazyTransitions, size: int, world: World) -> dict[str, Tensor]:
    """All ranks' transitions, copied to the host `size` at a time. Trajectories of different ranks have different numbers."""
    parts = [selection.gather(rows) for rows in torch.arange(len(selection)).split(size)]
    own = {
        field.name: torch.cat([getattr(part, field.name).cpu() for part in parts])
        for field in dataclasses.fields(Transitions)
    }
    own["trajectory"] = own["trajectory"] * world.size + world.rank
    if selection.reverse_factor is not None:
        own["reverse_factor"] = selection.reverse_factor
    return {f"transitions.{name}": world.all_gather(values) for name, values in own.items()}


def _files(tensors: dict[str, Tensor]) -> dict[str, Callable[[], bytes]]:
    """By file name, functions that return its content. Collective if tensors are sharded."""
    sizes = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in tensors.items()}
    pattern = f"update{{suffix}}{SUFFIX}"
    files = split_torch_state_dict_into_shards(sizes, filename_pattern=pattern, max_shard_size=FILE_BYTES)

    def content(names: list[str]) -> Callable[[], bytes]:
        return lambda: save({name: _whole(tensors[name]) for name in names})

    return {file: content(names) for file, names in files.filename_to_tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    """The tensor on the host. Collective if it is sharded."""
    return whole(tensor).cpu().contiguous()


def _writer(content: Callable[[], bytes]) -> Write:
    def write(file: BinaryIO) -> None:
        file.write(content())

    return write
