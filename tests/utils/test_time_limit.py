"""Calls that do not come back: a reward that sleeps, spins, swallows the alarm, or hangs where Python does not run."""

import contextlib
import functools
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from traceback import extract_tb

import pytest
import torch

from fastnabla import train
from fastnabla.rewards import RewardSum, check_reward
from fastnabla.rewards import score as scoring
from fastnabla.rewards.score import RewardError
from fastnabla.training.trainer import Trainer
from fastnabla.utils.time_limit import STATUS, time_limit
from tests.faults import assert_same_result
from tests.integration.test_extending import QUICK
from tests.ranks import begin, end


class Late(Exception):
    pass


def sleep() -> None:
    time.sleep(60)


def spin() -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pass


def wait() -> None:
    threading.Event().wait(60)


def retry() -> None:
    """As code does that takes every error for one of the network."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            time.sleep(1)


@pytest.mark.parametrize("hang", [sleep, spin, wait, retry])
def test_a_call_that_hangs_ends_with_the_error_and_its_place(hang) -> None:
    before, started = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(Late, match="too long") as caught, time_limit(0.2, Late("too long")):
        hang()
    assert time.monotonic() - started < 30
    frames, traceback = [], caught.value.__cause__.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert hang.__name__ in frames
    assert_nothing_is_left(before)


def assert_nothing_is_left(before: object) -> None:
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert not [
        thread
        for thread in threading.enumerate()
        if isinstance(thread, threading.Timer)
        and thread.function.__module__.startswith("fastnabla.")  # pytest-timeout has one of its own
        and not thread.finished.is_set()
    ]


def test_a_call_in_time_leaves_nothing_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(5.0, Late()):
        pass
    assert_nothing_is_left(before)
    with pytest.raises(KeyError), time_limit(5.0, Late()):
        raise KeyError
    assert_nothing_is_left(before)
    with time_limit(None, Late()):
        assert signal.getsignal(signal.SIGALRM) is before


LIMIT = "with time_limit(0.2, ValueError('too long'), grace=0.2):"
# The same lock a second time waits for ever, whatever signals come; PyDLL keeps the GIL meanwhile, CDLL does not.
DEADLOCK = f"""
lib, mutex = ctypes.KIND(None), ctypes.create_string_buffer(64)
lib.pthread_mutex_lock(mutex)
{LIMIT}
    lib.pthread_mutex_lock(mutex)
"""
SWALLOWED = f"""
{LIMIT}
    while True:
        try:
            time.sleep(60)
        except:
            pass
"""
ELSEWHERE = f"""
def hang():
    {LIMIT}
        time.sleep(60)
thread = threading.Thread(target=hang)
thread.start()
thread.join()
"""
HANGS = {
    "in C": (DEADLOCK.replace("KIND", "CDLL"), "error: too long"),
    "in C, with the GIL": (DEADLOCK.replace("KIND", "PyDLL"), "Timeout (0:00:0"),
    "swallowing everything": (SWALLOWED, "error: too long"),
    "in another thread": (ELSEWHERE, "error: too long"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HANGS)
def test_what_cannot_be_interrupted_ends_the_process(name: str) -> None:
    hang, said = HANGS[name]
    code = (
        f"import ctypes, threading, time\nfrom fastnabla.utils.time_limit import time_limit\n{hang}\nprint('came back')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == STATUS, done.stderr
    assert said in done.stderr and 'File "<string>"' in done.stderr and not done.stdout


def test_a_reward_that_hangs_in_the_check_before_a_run_is_named() -> None:
    reward = RewardSum({"mine:slow": (lambda images, prompts: time.sleep(60), 1.0)}, timeout=0.2)
    with pytest.raises(RewardError, match=r"'mine:slow' did not return from 2 images within reward\.timeout = 0\.2 s"):
        check_reward(reward, ["a cow"], (8, 8))


class SleepsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images.mean((1, 2, 3))

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(60)


def test_a_reward_whose_backward_pass_hangs_is_named() -> None:
    """The second term's limit holds in the backward pass of the sum, which comes after both calls."""
    terms = {"fine": (lambda images, prompts: images.mean((1, 2, 3)), 1.0)}
    terms["mine:slow"] = (lambda images, prompts: SleepsBackward.apply(images), 1.0)
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    before, values = signal.getsignal(signal.SIGALRM), RewardSum(terms, timeout=0.2)(images, ["a cow"] * 2)
    message = r"'mine:slow' did not return from the gradients of 2 images within reward\.timeout = 0\.2 s"
    with pytest.raises(RewardError, match=message) as caught:
        torch.autograd.grad(values.sum(), images)
    assert any(
        frame.name == "backward" and "time.sleep" in frame.line
        for frame in extract_tb(caught.value.__cause__.__traceback__)
    )
    assert_nothing_is_left(before)


def test_a_backward_pass_in_another_thread_ends_the_process(tmp_path: Path) -> None:
    """Autograd has its own thread for a GPU, where no signal arrives."""

    def differentiate() -> None:
        images = torch.rand(2, 3, 8, 8, requires_grad=True)
        reward = RewardSum({"mine:slow": (lambda images, prompts: SleepsBackward.apply(images), 1.0)}, timeout=0.2)
        torch.autograd.grad(reward(images, ["a cow"] * 2).sum(), images)

    def run() -> int:
        scoring.time_limit = functools.partial(time_limit, grace=0.2)
        with open(tmp_path / "told", "w") as told:
            os.dup2(told.fileno(), 2)
        thread = threading.Thread(target=differentiate)
        thread.start()
        thread.join()
        return 0

    assert end(begin(1, run)) == [STATUS]
    told = (tmp_path / "told").read_text()
    assert "error: reward 'mine:slow' did not return from the gradients of 2 images" in told and "in backward" in told


def test_a_limit_changes_no_value() -> None:
    """Nor a gradient, which each call has once."""
    images, terms = torch.rand(3, 3, 4, 4), {"mean": (lambda images, prompts: images.square().mean((1, 2, 3)), 2.0)}
    images.requires_grad_()
    expected = 2 * images.square().mean((1, 2, 3))
    (slope,) = torch.autograd.grad(expected.sum(), images)
    for timeout in (60.0, None):
        values = RewardSum(terms, timeout=timeout)(images, ["a"] * 3)
        (gradient,) = torch.autograd.grad(values.sum(), images, retain_graph=True)
        assert torch.equal(values, expected) and torch.equal(gradient, slope)
        with pytest.raises(RuntimeError, match="once per call"):
            torch.autograd.grad(values.sum(), images)


HANGING = """
import time
calls = 0
def reward(images, prompts):
    global calls
    calls += images.requires_grad
    while calls == HANGS_AT:
        BODY
    return images.mean((1, 2, 3))
"""


@pytest.mark.slow
@pytest.mark.parametrize("body", ["time.sleep(60)", "pass"], ids=["sleeps", "spins"])
def test_a_run_whose_reward_hangs_ends_and_can_be_resumed(
    body: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(Trainer, "_write_pictures", lambda *_: None)

    def use(hangs_at: int) -> None:
        sys.modules.pop("hanging", None)
        importlib.invalidate_caches()
        source = HANGING.replace("HANGS_AT", str(hangs_at)).replace("BODY", body)
        (tmp_path / "hanging.py").write_text(f"# {hangs_at:20}\n{source}")  # of another size, else its bytecode counts

    command = [*QUICK, "--reward.terms=hanging:reward", "--checkpoint-every=1", "--evaluation.every=0", "--updates=2"]
    command += ["--rollout.updates=1", "--reward.timeout=2"]
    use(3)  # the last call of the second update; the first is the check before the run
    assert train.main([*command, "--run=hung"]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "reward 'hanging:reward' did not return" in message and "--resume hung" in message
    assert "while calls ==" in message or body in message  # where it was
    assert [path.name for path in Path("hung/checkpoints").iterdir()] == ["update-000001"]
    if body == "pass":  # one that sleeps leaves the same
        use(-1)
        assert train.main(["--resume=hung"]) == 0
        assert train.main([*command, "--run=whole"]) == 0
        assert_same_result(Path("hung"), Path("whole"))
