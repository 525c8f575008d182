"""Shared by the benchmarks: device timing, counts of launches and memory, and a description of the machine.

Device times are in µs, from CUDA events on the current stream. Everything can be imported and called without CUDA; what cannot
be measured there is None.
"""

import contextlib
import functools
import importlib.util
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastnabla.utils.tensor_bytes import LiveBytes

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[[], Any]


@functools.cache
def device_info() -> dict[str, Any]:
    """The hardware and the versions of the software."""
    info = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
    }
    if not torch.cuda.is_available():
        return {"hardware": info["cpu"], **info}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu = {
        "hardware": properties.name,
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory MiB": properties.total_memory // 2**20,
        "L2 MiB": properties.L2_cache_size / 2**20,
    }
    return {**gpu, **_driver_info(properties), **info}


def _driver_info(properties: Any) -> dict[str, Any]:
    """Driver version and power limit, from nvidia-ml-py or nvidia-smi; None if neither reports them."""
    uuid = f"GPU-{properties.uuid}"
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        power = pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000
        return {"driver": pynvml.nvmlSystemGetDriverVersion(), "power limit W": power}
    except Exception:  # not installed, or not reported by this GPU
        query = ["nvidia-smi", "-i", uuid, "--query-gpu=driver_version,power.limit", "--format=csv,noheader,nounits"]
        driver, _, power = _output(query).partition(", ")
        return {"driver": driver or None, "power limit W": power or None}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(module: str) -> str | None:
    return importlib.import_module(module).__version__ if importlib.util.find_spec(module) else None


def _commit() -> str | None:
    """The commit, with a + if tracked files have changed; None outside a repository."""
    git = ["git", "-C", str(ROOT)]
    commit = _output([*git, "rev-parse", "--short=12", "HEAD"])
    return commit + "+" * bool(_output([*git, "status", "--porcelain", "--untracked-files=no"])) if commit else None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def synchronised(run: Run) -> Run:
    """`run`, followed by a device synchronisation on CUDA."""
    if not torch.cuda.is_available():
        return run

    def run_and_wait() -> None:
        run()
        torch.cuda.synchronize()

    return run_and_wait


@functools.cache
def copy_bandwidth(device: torch.device, repetitions: int = 10) -> float:
    """Achievable bandwidth in GB/s (10⁹ bytes read or written a second): that of a float32 `copy_`, median.

    The tensors have 1 GiB each on CUDA, timed with events, and 128 MiB on a CPU.
    """
    size = (2**30 if device.type == "cuda" else 2**27) // 4
    source, target = torch.ones(size, device=device), torch.zeros(size, device=device)
    if device.type == "cuda":
        microseconds = _between_events(lambda: target.copy_(source), repetitions)
    else:
        microseconds = 1e6 * statistics.median(seconds(lambda: target.copy_(source)) for _ in range(repetitions))
    return 2 * source.nbytes / microseconds / 1e3


def seconds(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, by `clock`."""
    start = clock()
    run()
    return clock() - start


def quiet_clock(device: torch.device) -> Callable[[], float]:
    """A wall clock; for a single CPU thread the CPU time, which other processes on the machine hardly affect."""
    single = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if single else time.perf_counter


def time_cuda(run: Run) -> float | None:
    """µs between events before and after a call, with a cold L2 cache; median.

    Launching overlaps with flushing the cache, so this is device time unless launching takes longer than the flush.
    """
    return _between_events(run) if torch.cuda.is_available() else None


def time_graph(run: Run) -> float | None:
    """µs of a call replayed from a CUDA graph, with a cold L2 cache: device time without launch overhead.

    Includes the few µs that the device takes to start a graph. Call this on a non-default stream (`own_stream`) on which the
    inputs of `run` were created: autograd runs a backward pass on the stream of its forward pass, and the default stream
    cannot be captured.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    if not torch.cuda.is_available():
        return None
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    microseconds = _between_events(graph.replay)
    graph.reset()
    return microseconds


def own_stream() -> contextlib.AbstractContextManager:
    """A context with a non-default stream, always the same one; no effect on a CPU."""
    return torch.cuda.stream(_stream()) if torch.cuda.is_available() else contextlib.nullcontext()


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _between_events(run: Run, repetitions: int | None = None) -> float:
    flush = _flush_buffer(torch.cuda.current_device())
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    if repetitions is None:
        repetitions = max(10, min(50, int(0.2 / seconds(synchronised(run)))))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for start, end in marks:
        flush.sum(dtype=torch.int32)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in marks)


@functools.cache
def _flush_buffer(device: int) -> Tensor:
    """256 MiB, or four times the L2 cache. Reading it evicts everything else, and takes longer than most launches. Writing it
    instead would leave dirty lines, which the timed call would have to write back."""
    size = max(2**28, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.zeros(size // 4, dtype=torch.int32, device=f"cuda:{device}")


def launches(run: Run, calls: int = 4) -> float | None:
    """Number of kernels, copies and fills that a call launches, by torch.profiler; None if it sees none."""
    if not torch.cuda.is_available():
        return None

    def all_calls() -> None:
        for _ in range(calls):
            run()

    run()
    torch.cuda.synchronize()
    return (len(device_events(all_calls)) / calls) or None


def device_events(run: Run) -> list[dict[str, Any]]:
    """The kernels, copies and fills that a call launches, from torch.profiler's trace: "name", and "ts" and "dur" in µs. The
    host is not traced, since that would slow it down."""
    _wake_profiler()
    return _trace(run)


@functools.cache
def _wake_profiler() -> None:
    """Run a dummy profile, because the first profile of a process can miss kernels."""
    _trace(lambda: torch.zeros(1, device="cuda"))


def _trace(run: Run) -> list[dict[str, Any]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(errors="replace"), strict=False)["traceEvents"]
    return [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def peak_memory(run: Run) -> float | None:
    """Peak MiB allocated during a call, in addition to what was allocated before it."""
    if not torch.cuda.is_available():
        return None
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_and_seconds(run: Run, device: torch.device, compiled: bool = False) -> tuple[float | None, float]:
    """Peak GiB of a warm call, in addition to what was allocated before it, and its seconds.

    On a CPU the two are from separate calls, and the peak is counted by `LiveBytes`; for compiled code it is None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        elapsed = seconds(synchronised(run))
        return (torch.cuda.max_memory_allocated() - before) / 2**30, elapsed
    if compiled:
        return None, seconds(run, quiet_clock(device))
    with LiveBytes() as memory:
        run()
    return memory.peak / 2**30, seconds(run, quiet_clock(device))
