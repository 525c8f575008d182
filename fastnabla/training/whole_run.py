"""Trains a run to its end, and turns whatever ends it into a message and an exit status."""

import errno
import os
from pathlib import Path

from rich.console import Console

from fastnabla.distributed.signals import Stopped, StopSignals
from fastnabla.distributed.world import World
from fastnabla.methods.zero_gradients import ZeroGradientError
from fastnabla.rewards.score import RewardError
from fastnabla.run.checkpoint import FOLDER, CheckpointError
from fastnabla.run.lock import RunFolderError
from fastnabla.training.guards import BoundPassed
from fastnabla.training.trainer import Trainer
from fastnabla.utils.console import print_error, print_plain, print_traceback

DIVERGED = 4
"""Exit status of a run that ends because its loss is not finite."""


def fail(world: World, error: BaseException, message: str | None = None, cause: BaseException | None = None) -> None:
    """Print why this process ends, and end the other ranks.

    Args:
        world: the ranks.
        error: why it ends.
        message: printed instead of the error's own message.
        cause: an exception whose traceback is printed first.
    """

    def show() -> None:
        if cause is not None:
            print_traceback(cause)
        print_error(f"{world.name}: {message or error}" if world.size > 1 else message or str(error))

    world.fail(error, show)


def _kept(run: Path) -> str:
    any_saved = any((run / FOLDER).glob("update-*"))
    return "The newest checkpoint is intact." if any_saved else "There is no checkpoint yet."


def train_to_the_end(trainer: Trainer, run: Path, console: Console, resume: bool, command: str) -> int:
    """Train, and print what ended the run if it was not the last update.

    Args:
        trainer, run, console, resume: see `Trainer.train`.
        command: continues the run; part of the messages.

    Returns:
        The exit status; 0 after the last update.
    """
    go_on = f"resume with: {command}"
    try:
        with StopSignals() as stop:
            trainer.train(run, console, resume, stop)
    except Stopped as stopped:
        print_plain(console, f"stopped by {stopped}; the state is saved. To continue, {go_on}")
        return stopped.status
    except BoundPassed as passed:
        if trainer.world.is_main:
            print_error(
                f"{passed}. The state is saved. Look at the pictures in {run}. To train on, loosen the bound in its "
                f"config.json or set it to null, and {go_on}"
            )
        return BoundPassed.STATUS
    except RunFolderError as error:
        fail(trainer.world, error)
        return 2
    except RewardError as error:
        message = f"{error} {_kept(run)} Fix the reward, and {go_on}"
        fail(trainer.world, error, message, error.__cause__)
        return 1
    except FloatingPointError as error:
        fail(trainer.world, error, f"{error} The newest checkpoint is from before these updates.")
        return DIVERGED
    except ZeroGradientError as error:
        fail(trainer.world, error, f"{error} A run's settings cannot change: start a new run with the remedy.")
        return 1
    except CheckpointError as error:
        fail(trainer.world, error)
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{error.strerror} in {run}. {_kept(run)} Free some space, and {go_on}"
        elif error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(run):
            message = f"{os.fsdecode(error.filename)!r} cannot be used: {error.strerror}. Fix that, and {go_on}"
        else:
            raise
        fail(trainer.world, error, message)
        return 1
    except KeyboardInterrupt as error:
        trainer.world.fail(error, lambda: print_plain(console, f"interrupted. To continue, {go_on}"))
        return 130
    return 0
