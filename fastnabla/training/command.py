"""What `python -m fastnabla.train` does once its command line is parsed: start or resume a run, or print its cost."""

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastnabla.config.train import TrainConfig, from_json, load_run, to_json
from fastnabla.cost.planner import MemoryPlan, planned, unit_costs
from fastnabla.cost.update_cost import cost_table, measured_rate, update_cost
from fastnabla.distributed.devices import device_of
from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.world import LostProcess, World, log_as
from fastnabla.models.sampler_table import sampler_table
from fastnabla.prompts import RunPrompts, look, prompts_of
from fastnabla.run.folder import create_run_folder
from fastnabla.run.lock import locked
from fastnabla.run.resuming import AUTO, is_unbegun, run_to_resume, updates_of
from fastnabla.training.build import build_components
from fastnabla.training.check_model import check_model
from fastnabla.training.trainer import Trainer
from fastnabla.training.whole_run import fail, train_to_the_end
from fastnabla.utils.console import print_error, print_plain, silenced
from fastnabla.utils.determinism import make_deterministic
from fastnabla.utils.durable import write_file


def run_command(config: TrainConfig, info: RankInfo) -> int:
    """Run the command line in this process, together with the other ranks if there are several. Returns the exit status.

    Args:
        config: the command line's.
        info: this process among the ranks.
    """
    try:
        if _is_deterministic(config):
            with silenced(info.rank > 0):
                make_deterministic()  # before CUDA starts
        world = World.start(info, device_of(config, info))
    except ValueError as error:
        print_error(error)
        return 2
    log_as(world)
    try:
        status = _run(config, world)
    except Exception as error:
        if world.size == 1:
            raise
        lost = isinstance(error, LostProcess)
        fail(world, error, None if lost else f"{type(error).__name__}: {error}", None if lost else error)
        status = 1
    return world.shutdown(status)


def _is_deterministic(config: TrainConfig) -> bool:
    """Whether the run that the command line starts or resumes is deterministic."""
    folder = config.run if config.resume == AUTO else config.resume
    with contextlib.suppress(ValueError):  # there is no run, or it is damaged: `_start` reports it
        return config.deterministic if folder is None else load_run(folder).deterministic
    return config.deterministic


def _run(config: TrainConfig, world: World) -> int:
    console = Console(quiet=not world.is_main)
    try:
        start = world.broadcast(lambda: _start(config, world, console))
        config = from_json(start["config"])
        trainer = _built(config, RunPrompts.from_json(start.pop("prompts")), world)
        if config.dry_run:
            if world.is_main:
                _print_costs(trainer, start["plan"], console)
            return 0
        run = Path(world.broadcast(lambda: str(_folder(config, start["run"]))))
    except ValueError as error:
        fail(world, error)
        return 2
    many = f" and {world.size - 1} more" if world.size > 1 else ""
    kernels = trainer.step.ops.name
    print_plain(console, f"writing to {run}; {kernels} between network passes, on {trainer.components.device}{many}")
    command = f"python -m fastnabla.train --resume {shlex.quote(str(run))}"
    status = train_to_the_end(trainer, run, console, start["resumed"], command)
    if status == 0:
        print_plain(console, f"samples, curves, LoRA and metrics are in {run}")
    return status


def _start(config: TrainConfig, world: World, console: Console) -> dict[str, Any]:
    """What depends on files and free memory, as JSON data: rank 0 determines it for all ranks.

    Args:
        config: the command line's.
        world: the run's processes.
        console: where to print notes, the memory plan and a look at the prompts.

    Raises:
        ValueError: the run cannot be started or resumed, or its prompts cannot be loaded.
    """
    run, resume = config.run, run_to_resume(config)
    if resume is not None:
        run, notes = resume
        own = load_run(run)
        config = dataclasses.replace(own, dry_run=config.dry_run, updates=updates_of(config, own))
        with _writable(run), locked(run):  # refused now instead of after everything is loaded
            pass
        for note in notes:
            print_plain(console, note, "yellow")
    elif run is not None and run.exists() and not (config.resume == AUTO and is_unbegun(run)):
        raise ValueError(
            f"run = {str(run)!r}: exists already and is never overwritten; choose another folder or remove it."
        )
    check_model(config)
    prompts = (
        prompts_of(config.prompts, config.evaluation.prompts, config.seed)
        if resume is None
        else RunPrompts.load(run / "prompts.json")
    )
    config, plan = planned(config, device_of(config), world.local_size, world.size, len(prompts.texts))
    if plan is not None:
        console.print(plan.table())
    print_plain(console, look(prompts))
    return {
        "config": to_json(config),
        "plan": None if plan is None else dataclasses.asdict(plan),
        "run": None if run is None else str(run),
        "resumed": resume is not None,
        "prompts": prompts.to_json(),
    }


def _built(config: TrainConfig, prompts: RunPrompts, world: World) -> Trainer:
    """The trainer.

    Raises:
        ValueError: the configuration is invalid, or needs more memory than there is.
    """
    try:
        return Trainer(build_components(config, prompts, world))
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch raises a plain RuntimeError.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(
            f"memory ran out before the run could start ({str(error).splitlines()[0]:.200}). Lower one of these: "
            f"rollout.trajectories = {config.rollout.trajectories}, evaluation.samples = {config.evaluation.samples}, "
            f"lora.rank = {config.lora.rank}; or use a smaller model."
        ) from error


def _folder(config: TrainConfig, run: str | None) -> Path:
    if run is not None and Path(run).exists():
        _extend(Path(run), config.updates)
        return Path(run)
    return create_run_folder(
        None if run is None else Path(run), Path(config.model.name).name.removesuffix(".safetensors")
    )


def _extend(run: Path, updates: int) -> None:
    """Extend the run in the folder `run`, if there is one, to `updates` updates."""
    if is_unbegun(run):
        return
    own = load_run(run)
    if own.updates != updates:
        with _writable(run), locked(run):
            write_file(run / "config.json", to_json(dataclasses.replace(own, updates=updates)))


@contextlib.contextmanager
def _writable(run: Path) -> Iterator[None]:
    """Within the context, the run folder `run` is written.

    Raises:
        ValueError: it cannot be.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"run = {str(run)!r}: cannot be written: {error.strerror}. Free some space there, or make the folder writable."
        ) from error


def _print_costs(trainer: Trainer, plan: dict[str, Any] | None, console: Console) -> None:
    config = trainer.config
    console.print_json(to_json(config))
    console.print(sampler_table(config.model, config.sampler, trainer.components.table))
    costs = unit_costs(config)
    rate = measured_rate(trainer.policy, costs, config.memory.micro_batch)
    console.print(cost_table(update_cost(config, costs), plan and MemoryPlan(**plan), rate))
