"""`python -m fastnabla.train [PRESET] [--field value …]`: finetune a diffusion model. Without arguments: the testbed."""

import dataclasses
import errno
import os
import shlex
import sys
import traceback
from pathlib import Path

import torch
import tyro
from rich.console import Console

from fastnabla.telemetry import create_run_folder, print_error, print_plain, quiet_libraries

quiet_libraries()

from fastnabla.bounds import BoundPassed  # noqa: E402
from fastnabla.checkpoint import CheckpointError  # noqa: E402
from fastnabla.config import TrainConfig, load_run, to_json  # noqa: E402
from fastnabla.cost import cost_table, measured_rate, update_cost  # noqa: E402
from fastnabla.durable import write_file  # noqa: E402
from fastnabla.planner import planned, unit_costs  # noqa: E402
from fastnabla.presets import PRESETS  # noqa: E402
from fastnabla.prompts import RunPrompts  # noqa: E402
from fastnabla.resuming import AUTO, is_unbegun, run_to_resume, updates_of  # noqa: E402
from fastnabla.rewards.sum import RewardError  # noqa: E402
from fastnabla.run_lock import RunFolderError, locked  # noqa: E402
from fastnabla.sections import TESTBED  # noqa: E402
from fastnabla.signals import Stopped, StopSignals  # noqa: E402
from fastnabla.trainer import Trainer, device_of  # noqa: E402

DIVERGED = 4
"""Exit status of a run that ends because its numbers are not finite."""


def parse(arguments: list[str]) -> TrainConfig:
    """The configuration of a command line; the testbed's preset if none is named."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = [TESTBED, *arguments]
    description = (
        "Finetune a diffusion model against a differentiable reward with residual ∇-DB. Without arguments: the testbed. "
        f"`python -m fastnabla.train {TESTBED} --help` explains every field."
    )
    return tyro.extras.overridable_config_cli(
        PRESETS, args=arguments, prog="python -m fastnabla.train", description=description
    )


def _built(config: TrainConfig, prompts: RunPrompts | None) -> Trainer:
    """The trainer.

    Raises:
        ValueError: something in the configuration is wrong, or asks for more memory than there is.
    """
    try:
        return Trainer(config, prompts)
    except (MemoryError, RuntimeError) as error:
        # On a CPU, torch's is a RuntimeError as any other.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(
            f"memory ran out before the run could begin ({str(error).splitlines()[0]:.200}). Lower what asks for it: "
            f"rollout.trajectories = {config.rollout.trajectories}, evaluation.samples = {config.evaluation.samples}, "
            f"lora.rank = {config.lora.rank}; or use a smaller model."
        ) from error


def main(arguments: list[str]) -> int:
    """Run the command line; the exit status."""
    console = Console()
    try:
        config = parse(arguments)
        run, resume = config.run, run_to_resume(config)
        if resume is not None:
            run, notes = resume
            own = load_run(run)
            config = dataclasses.replace(own, dry_run=config.dry_run, updates=updates_of(config, own))
            with locked(run):  # refused now, rather than when all is loaded
                pass
            for note in notes:
                print_plain(console, note, "yellow")
        elif run is not None and run.exists() and not (config.resume == AUTO and is_unbegun(run)):
            raise ValueError(
                f"run = {str(run)!r}: exists already, and is never overwritten; name another or remove it."
            )
        config, plan = planned(config, device_of(config))
        if plan is not None:
            console.print(plan.table())
        trainer = _built(config, RunPrompts.load(run / "prompts.json") if resume else None)
        if config.dry_run:
            console.print_json(to_json(config))
            costs = unit_costs(config)
            rate = measured_rate(trainer.policy, costs, config.memory.micro_batch)
            console.print(cost_table(update_cost(config, costs), plan, rate))
            return 0
        if resume and config.updates != own.updates:
            with locked(run):
                write_file(run / "config.json", to_json(dataclasses.replace(own, updates=config.updates)))
        if run is None or not run.exists():
            run = create_run_folder(run, Path(config.model.name).name)
    except ValueError as error:
        print_error(error)
        return 2
    print_plain(console, f"writing to {run}; {trainer.step.kernels.name} between network passes, on {trainer.device}")
    command = f"python -m fastnabla.train --resume {shlex.quote(str(run))}"
    status = train_to_the_end(trainer, run, console, resume is not None, command)
    if status == 0:
        print_plain(console, f"samples, curves, LoRA and metrics are in {run}")
    return status


def train_to_the_end(trainer: Trainer, run: Path, console: Console, resume: bool, command: str) -> int:
    """Train, and say what ended it if that was not the last update; the exit status, 0 if it was.

    Args:
        trainer, run, console, resume: see `Trainer.train`.
        command: what continues the run, for the message.
    """
    go_on = f"go on with: {command}"
    try:
        with StopSignals() as stop:
            trainer.train(run, console, resume, stop)
    except Stopped as stopped:
        print_plain(console, f"stopped by {stopped}, all is saved; {go_on}")
        return stopped.status
    except BoundPassed as passed:
        print_error(
            f"{passed}. All is saved: look at the pictures in {run}. To train on nonetheless, loosen that bound in its "
            f"config.json, or make it null, and {go_on}"
        )
        return BoundPassed.STATUS
    except RunFolderError as error:
        print_error(error)
        return 2
    except RewardError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print_error(f"{error} The newest checkpoint is intact: mend it, and {go_on}")
        return 1
    except FloatingPointError as error:
        print_error(f"{error} The newest checkpoint is from before that.")
        return DIVERGED
    except CheckpointError as error:
        print_error(error)
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            print_error(f"{error.strerror} in {run}. The newest checkpoint is intact: make room, and {go_on}")
        elif error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(run):
            print_error(f"{os.fsdecode(error.filename)!r} cannot be used: {error.strerror}. Put it right, and {go_on}")
        else:
            raise
        return 1
    except KeyboardInterrupt:
        print_plain(console, f"interrupted; {go_on}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
