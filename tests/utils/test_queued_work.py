"""Work on a device that does not become complete, with stand-ins for its events."""

import contextlib
import subprocess
import sys
import threading

import pytest
import torch

from fastnabla.rewards import RewardSum
from fastnabla.rewards import score as scoring
from fastnabla.utils import queued_work
from fastnabla.utils.queued_work import QueuedWork
from fastnabla.utils.time_limit import STATUS

GPU = torch.device("cuda")


class Event:
    """Complete once it is `set`; counts the polls."""

    def __init__(self, set: bool = False) -> None:
        self.set, self.polls, self.polled = set, 0, threading.Event()

    def query(self) -> bool:
        self.polls += 1
        if self.polls == 100:
            self.polled.set()
        return self.set


class BrokenEvent(Event):
    def query(self) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_only_work_that_has_begun_and_is_not_complete_in_time_expires(monkeypatch) -> None:
    expired, told = threading.Event(), []
    watch = QueuedWork(lambda message: (told.append(message), expired.set()))
    events = []

    def record(device: torch.device) -> Event:
        assert device is GPU
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(queued_work, "record", record)
    watch.watch(BrokenEvent(), BrokenEvent(), 0.01, "the device is broken")
    for message in ("complete", "hangs"):
        with watch.limit(0.01, message, GPU):
            pass
    first, last, begins, never = events
    assert first.polled.wait(60) and not last.polls and not told  # what was queued before may take long
    last.set = True
    first.set = True
    assert begins.polled.wait(60) and not told
    begins.set = True
    assert expired.wait(60) and told == ["hangs"] and never.polls > 1


def test_nothing_is_polled_while_work_is_queued_or_recorded_without_a_limit(monkeypatch) -> None:
    """Polling would break a CUDA graph that the block captures."""
    monkeypatch.setattr(queued_work, "record", lambda device: Event(set=True))
    watch, before = QueuedWork(), Event()
    watch.watch(before, Event(set=True), 0.01, "")
    assert before.polled.wait(60)
    with watch.limit(60.0, "", GPU):
        polls = before.polls
        threading.Event().wait(0.1)
        assert before.polls == polls
    before.set = True
    monkeypatch.delattr(queued_work, "record")
    with watch.limit(None, "", GPU), watch.limit(60.0, "", torch.device("cpu")):
        pass


def test_both_passes_of_a_reward_are_watched(monkeypatch) -> None:
    limits = []

    def limit(seconds: float, message: str, device: torch.device) -> contextlib.AbstractContextManager:
        limits.append((seconds, message.partition(" within")[0], device))
        return contextlib.nullcontext()

    monkeypatch.setattr(scoring.QUEUED, "limit", limit)
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    values = RewardSum({"mean": (lambda images, prompts: images.mean((1, 2, 3)), 1.0)}, timeout=60.0)(images, ["a"] * 2)
    torch.autograd.grad(values.sum(), images)
    whats = ["2 images", "the gradients of 2 images"]
    assert limits == [(60.0, f"reward 'mean' did not complete {what} on the GPU", images.device) for what in whats]


HANGS_ON_THE_GPU = """
import time, torch
from fastnabla.rewards import RewardSum
def slow(images, prompts):
    torch.cuda._sleep(10**12)
    return images.mean((1, 2, 3))
images = torch.rand(2, 3, 8, 8, device="cuda")
torch.cuda.synchronize()
started = time.monotonic()
RewardSum({"mine:slow": (slow, 1.0)}, timeout=2.0)(images, ["a"] * 2)
assert time.monotonic() - started < 1.5, "the host has waited"
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_reward_that_hangs_on_a_gpu_ends_the_process() -> None:
    command = [sys.executable, "-c", HANGS_ON_THE_GPU]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == STATUS and "error: reward 'mine:slow' did not complete 2 images on the GPU" in done.stderr
    assert "synchronize" in done.stderr and "Error" not in done.stderr
