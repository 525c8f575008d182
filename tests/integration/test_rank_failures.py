"""What ends one process ends all, soon, and says why; asked to stop, they stop together."""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import elastic_launch

from fastnabla.distributed import watchdog as watch
from fastnabla.distributed import world as distributed
from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.world import LostProcess, World
from fastnabla.optim.optimizer import Optimizer
from fastnabla.rewards.testbed import area
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories import rollout
from tests.ranks import begin, end, restarting_ranks, trained
from tests.runs import ON_SMALLEST

pytestmark = pytest.mark.slow

TINY = [
    *ON_SMALLEST,
    "--updates=2",
    "--tracker=none",
    "--device=cpu",
    "--reward.terms=tests.integration.test_rank_failures:reward=8",
    "--sampler.steps=2",
    "--sampler.guidance-scale=1",
    "--rollout.trajectories=4",
    "--rollout.updates=2",
    "--rollout.fraction=0.5",
    "--rollout.batch=1",
    "--memory.micro-batch=1",
    "--memory.decode-chunk=1",
    "--evaluation.samples=2",
    "--evaluation.prompts=1",
    "--evaluation.every=0",
    "--run=run",
]


class Reward:
    """The area, until it is `broken`."""

    broken = False

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if self.broken:
            raise ZeroDivisionError("no pixels left")
        return area(images.device)(images, prompts)


reward = Reward()


@pytest.fixture(autouse=True)
def impatient(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_write_pictures", lambda *_: None)
    monkeypatch.setattr(watch, "INTERVAL", 0.1)
    monkeypatch.setattr(watch, "LINGER", 0.5)


def before(owner: object, name: str, call: int, event: Callable[[], None]) -> None:
    """Let `event` happen before call number `call`, from 0, of the function `owner.name`."""
    function, calls = getattr(owner, name), []

    def called(*arguments, **options):
        calls.append(None)
        if len(calls) == call + 1:
            event()
        return function(*arguments, **options)

    setattr(owner, name, called)


def before_in_rank(chosen: int, *arguments: Any) -> Callable[[int], None]:
    return lambda rank: before(*arguments) if rank == chosen else None


def in_rank_1(*arguments: Any) -> Callable[[int], None]:
    return before_in_rank(1, *arguments)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def outputs(size: int) -> list[str]:
    return [Path(f"rank-{rank}.txt").read_text() for rank in range(size)]


def break_reward() -> None:
    reward.broken = True


def test_a_reward_that_raises_in_one_rank() -> None:
    prepare = in_rank_1(Optimizer, "update", 0, break_reward)
    assert end(begin(2, lambda: trained(TINY, prepare))) == [1, 1]
    first, failed = outputs(2)
    assert "ZeroDivisionError: no pixels left" in failed and "Traceback" in failed
    assert "error: rank 1 on" in failed and "reward 'tests.integration.test_rank_failures:reward' failed" in failed
    assert "error: rank 1 on" in first and "no pixels left" in first and "Traceback" not in first
    assert first.count("error:") == 1


def test_a_reward_that_raises_in_the_first_rank() -> None:
    """It holds the store. Its reason is the only one."""
    prepare = before_in_rank(0, Optimizer, "update", 0, break_reward)
    assert end(begin(2, lambda: trained(TINY, prepare))) == [1, 1]
    failed, other = outputs(2)
    assert "error: rank 0 on" in failed and "ZeroDivisionError: no pixels left" in failed
    assert "error:" not in other and "Traceback" not in other


def test_every_host_is_told_a_mistake_that_all_ranks_find() -> None:
    def alone_on_its_host() -> int:
        os.environ["LOCAL_RANK"] = "0"
        return trained([*TINY, "--reward.terms=beauty"])

    assert 0 not in end(begin(2, alone_on_its_host))
    assert all("unknown reward 'beauty'" in output for output in outputs(2))


def test_a_mistake_that_all_ranks_find_is_told_once_by_each() -> None:
    assert 0 not in end(begin(2, lambda: trained([*TINY, "--reward.terms=beauty"])))
    told = [output.count("unknown reward 'beauty'") for output in outputs(2)]
    assert max(told) == 1  # of a machine's two, by the first, or by both: the other was ended before it found out


@pytest.mark.parametrize("options", [(), ("--lora.rank=0",)], ids=["LoRA", "sharded"])
def test_a_rank_that_is_killed(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", 1.0)
    prepare = in_rank_1(Optimizer, "update", 0, send(signal.SIGKILL))
    assert end(begin(2, lambda: trained([*TINY, *options], prepare))) == [1, -signal.SIGKILL]
    told = outputs(2)[0]
    assert "error: rank 0 on" in told and "another process can no longer be reached" in told and "Traceback" not in told
    assert "no heartbeat from ranks [1]" in told


def test_a_rank_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the loss of its machine: its connections stay open."""
    monkeypatch.setattr(watch, "SILENCE", 3.0)
    children = begin(2, lambda: trained(TINY, in_rank_1(Optimizer, "update", 0, send(signal.SIGSTOP))))
    try:
        assert end(children[:1]) == [1]
    finally:
        os.kill(children[1], signal.SIGKILL)
    assert end(children[1:]) == [-signal.SIGKILL]
    assert f"error: rank 1 on {socket.gethostname()}: no heartbeat for 3 s; all processes end." in outputs(2)[0]


def sleep_forever() -> None:
    time.sleep(1e6)


def test_a_rank_that_hangs_in_a_step() -> None:
    prepare = in_rank_1(Optimizer, "update", 0, sleep_forever)
    assert end(begin(2, lambda: trained([*TINY, "--hang-timeout=5"], prepare))) == [1, 1]
    first, hung = outputs(2)
    name = f"error: rank 1 on {socket.gethostname()}: no progress for 5 s (hang_timeout) at "
    assert (
        name in hung and "in sleep_forever" in hung.partition(name)[0] and "in sleep_forever" in hung.partition(name)[2]
    )
    assert name in first and "in sleep_forever; all processes end." in first and first.count("error:") == 1


def wait_in_c_with_the_gil() -> None:
    """The same lock a second time waits for ever."""
    lib, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):
        lib.pthread_mutex_lock(mutex)


def test_a_rank_in_which_no_python_thread_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENCE", 3.0)

    def run() -> int:
        world = World.start(RankInfo.of())
        os.dup2(os.open(f"rank-{world.rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        if world.rank == 1:
            wait_in_c_with_the_gil()
        try:
            world.barrier()
        except LostProcess as lost:
            world.fail(lost, lambda: None)
        return world.shutdown(1)

    assert end(begin(2, run)) == [1, 1]
    first, hung = outputs(2)
    assert "Timeout (0:00:03" in hung and "in wait_in_c_with_the_gil" in hung
    assert f"rank 1 on {socket.gethostname()}: no heartbeat for 3 s" in first


def weights() -> torch.Tensor:
    layers = load_file("run/lora/pytorch_lora_weights.safetensors")
    return torch.cat([layers[name].flatten() for name in sorted(layers)])


def test_a_signal_to_one_rank_stops_all_and_another_number_goes_on() -> None:
    """Between the two updates of a rollout, so that the checkpoint has the rollout's trajectories: those of 2 processes for 1."""
    assert end(begin(1, lambda: trained(TINY))) == [0]
    expected = weights()
    Path("run").rename("alone")
    prepare = in_rank_1(Optimizer, "update", 0, send(signal.SIGTERM))
    assert end(begin(2, lambda: trained(TINY, prepare))) == [128 + signal.SIGTERM] * 2
    assert [folder.name for folder in Path("run/checkpoints").iterdir()] == ["update-000001"]
    assert "stopped by SIGTERM; the state is saved" in outputs(2)[0] and not outputs(2)[1].count("stopped")
    assert end(begin(1, lambda: trained(["--resume=run"]))) == [0]
    assert (weights() - expected).norm() < 1e-5 * expected.norm()  # sums of ranks round otherwise


def test_a_signal_in_a_rollout_of_one_rank_stops_all() -> None:
    prepare = in_rank_1(rollout, "advance", 7, send(signal.SIGUSR1))
    assert end(begin(2, lambda: trained(TINY, prepare))) == [128 + signal.SIGUSR1] * 2
    assert not Path("run/checkpoints").exists()


def restarted(arguments: list[str]) -> None:
    """A process of `torchrun`: rank 1 is killed in the second update of the first attempt."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        before(Optimizer, "update", 1, send(signal.SIGKILL))
    status = trained(arguments)
    if status:
        raise SystemExit(status)


def test_restarted_by_torchrun_it_goes_on_from_the_last_checkpoint() -> None:
    arguments = [*TINY, "--rollout.updates=1", "--checkpoint-every=1", "--resume=auto"]
    assert end(begin(1, lambda: trained(arguments))) == [0]
    expected = weights()
    Path("run").rename("alone")

    def agent() -> int:
        """In a process of its own, because torchrun's agent keeps the signals."""
        elastic_launch(restarting_ranks(), restarted)(arguments)
        return 0

    assert end(begin(1, agent)) == [0]
    assert (weights() - expected).norm() < 1e-5 * expected.norm()  # sums of ranks round otherwise
