"""Calls one reward: checks its result, and limits the time of its forward and its backward pass."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastnabla.distributed.beacon import BEACON
from fastnabla.rewards.one_node import as_one_node
from fastnabla.utils.queued_work import QUEUED
from fastnabla.utils.time_limit import time_limit

RewardFunction = Callable[[Tensor, Sequence[str]], Tensor]
"""Images `[B, 3, H, W]` in [0, 1] and B prompts → rewards `[B]`, differentiable with respect to the images."""

REMEDY = "If it needs more time, raise the limit, or set it to None (null in config.json) for no limit."


class RewardError(ValueError):
    """A reward failed, or returned an invalid result; the message names it."""


def score(
    name: str, reward: RewardFunction, images: Tensor, prompts: Sequence[str], timeout: float | None = None
) -> Tensor:
    """Call `reward` and check the result. The gradient with respect to the images can be taken once.

    Args:
        name: name of the reward, for messages.
        reward: the reward.
        images: `[B, 3, H, W]` in [0, 1].
        prompts: B prompts.
        timeout: seconds that the call may take, its backward pass, and the work that either queues on a GPU; None for no limit.
            The backward pass raises the error from autograd's call. In autograd's own thread, and for queued work, there is
            nowhere to raise it: the process ends with the error; see `fastnabla.utils.time_limit` and
            `fastnabla.utils.queued_work`.

    Raises:
        RewardError: the reward fails, times out, does not return a tensor `[B]`, or has no gradient although the images
            require one.
    """
    forward, backward = (
        functools.partial(_limited, name, f"{what}{len(images)} images", timeout, images.device)
        for what in ("", "the gradients of ")
    )
    return as_one_node(functools.partial(_checked, name, reward, prompts), images, forward, backward)


def _checked(name: str, reward: RewardFunction, prompts: Sequence[str], images: Tensor) -> Tensor:
    try:
        values = reward(images, prompts)
    except torch.OutOfMemoryError:  # the caller retries with smaller batches
        raise
    except Exception as error:
        raise RewardError(
            f"reward {name!r} failed on images {tuple(images.shape)}: {type(error).__name__}: {error}."
        ) from error
    count = len(images)
    if not isinstance(values, Tensor) or tuple(values.shape) != (count,):
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(
            f"reward {name!r} returned {found} for {count} images; it must return a tensor of shape ({count},)."
        )
    if images.requires_grad and torch.is_grad_enabled() and not values.requires_grad:
        raise RewardError(
            f"reward {name!r} has no gradient with respect to the images; ∇-DB needs one. Look for torch.no_grad, "
            ".detach(), numpy or PIL inside it."
        )
    return values


@contextlib.contextmanager
def _limited(name: str, what: str, timeout: float | None, device: torch.device) -> Iterator[None]:
    """Limit the time of a pass. While a limit holds, it alone counts: it may be longer than that of a rank without progress."""
    BEACON.advance()
    if timeout is None:
        yield
        return
    late = f"reward {name!r} did not return from {what} within reward.timeout = {timeout} s. {REMEDY}"
    queued = f"reward {name!r} did not complete {what} on the GPU within reward.timeout = {timeout} s. {REMEDY}"
    with BEACON.excused(), time_limit(timeout, RewardError(late)), QUEUED.limit(timeout, queued, device):
        yield
