"""Runs tests and benchmarks on a GPU within ten minutes, the most important first; `bench/gpu.sh` starts it.

    bench/gpu.sh [PART[=SECONDS] …]

runs all `PARTS`, or the named ones in the given order; SECONDS replaces a part's time limit. Each part runs in separate
processes. It may use its seconds and those left over by earlier parts. Everything ends after `TOTAL` seconds. A part that
fails or cannot run does not affect the others.

Every row is written as soon as it is measured, as a line of `gpu_<date>T<time>.jsonl` and into the `.md` file beside it. So an
interrupted run keeps what was measured so far. The files are in the folder $OUT if set, otherwise in bench/results.

FASTNABLA_BENCH_DRY=1 makes a dry run: everything at toy size on the CPU, to exercise the code on a machine without a GPU. Its
figures mean nothing. Its output is marked as a dry run and goes to $OUT or a new temporary folder.
"""

import dataclasses
import datetime
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import rows

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 570
"""Time limit in seconds for everything; a run is given 590, part of which goes to copying."""
GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL for a part."""
PYTHON = sys.executable
BUILD = ROOT / "build" / "gpu"
EXTENSION = BUILD / "fastnabla" / "_C.so"
Command = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Commands that run one after the other, even if one fails, within `seconds` in total."""

    name: str
    seconds: float
    commands: tuple[Command, ...]
    needs: tuple[str, ...] = ()
    """Packages that must be installed, otherwise the part is skipped."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def module(name: str, *arguments: str) -> Command:
    return (PYTHON, "-m", name, *arguments)


def pytest(*arguments: str) -> Command:
    return module("pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.recorder", "--tb=short", *arguments)


def benchmark(name: str) -> Command:
    return pytest(f"bench/bench_{name}.py", "--benchmark-only", "--benchmark-quiet")


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


SETUP = ("env", "-C", str(ROOT / "build" / "source"), PYTHON, "setup.py", "build_ext")
WORKERS = ("-n", "2" if rows.is_dry() else "8") if has("xdist") else ()
TESTBED = ("fastnabla.train", "testbed", "--updates", "2", "--rollout.trajectories", "8", "--compute.compile", "none")
TESTBED += (
    "--tracker",
    "none",
    "--evaluation.samples",
    "2",
    "--evaluation.every",
    "0",
    "--evaluation.prompts",
    "2",
    "--run",
    "{scratch}/testbed",
)
NETWORKS = ("diffusers", "transformers", "peft")
PYTEST = ("pytest", "pytest_benchmark")
PARTS = (
    Part(
        name="build",
        seconds=30,
        commands=(
            (*SETUP, "--build-lib", str(BUILD), "--build-temp", str(BUILD / "temp")),
            (PYTHON, "-c", "from fastnabla.trajectories.buffer_ops import require_cuda; require_cuda()"),
            module("bench.smoke"),
        ),
        needs=("setuptools",),
        environment={"FASTNABLA_CUDA": "1", "FASTNABLA_CUDA_ARCHITECTURES": "90"},
    ),
    Part(
        name="tests",
        seconds=65,
        commands=(pytest(*WORKERS, "-m", "gpu and not huge", "--continue-on-collection-errors", "tests"),),
        needs=("pytest",),
    ),
    Part(name="testbed", seconds=25, commands=(module(*TESTBED),), needs=(*NETWORKS, "tyro")),
    Part(name="step", seconds=120, commands=(module("bench.whole_step", "--rows", "decisive"),), needs=NETWORKS),
    Part(name="profile", seconds=30, commands=(module("bench.profiled_step"),), needs=NETWORKS),
    Part(name="decoder", seconds=60, commands=(benchmark("decoder"),), needs=(*PYTEST, "diffusers")),
    Part(name="blocks", seconds=90, commands=(module("bench.compiled_step", "blocks"),), needs=NETWORKS),
    Part(name="micro-batch", seconds=35, commands=(module("bench.batch_sizes"),), needs=NETWORKS),
    Part(name="kernels", seconds=50, commands=(benchmark("group_norm_silu"), benchmark("kernels")), needs=PYTEST),
    Part(name="buffer", seconds=20, commands=(benchmark("buffer"),), needs=PYTEST),
    # Only if there is time left.
    Part(name="whole", seconds=180, commands=(module("bench.compiled_step", "whole"),), needs=NETWORKS),
    Part(
        name="memcheck",
        seconds=40,
        commands=(("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99", *module("bench.smoke")),),
        # torch's allocator serves many tensors from one allocation, which hides out-of-bounds accesses.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
    Part(name="growth", seconds=120, commands=(module("bench.growth"),), needs=NETWORKS),
    Part(
        name="huge",
        seconds=60,
        commands=(pytest("-m", "huge", "--continue-on-collection-errors", "tests"),),
        needs=("pytest",),
    ),
    Part(name="quantise", seconds=60, commands=(module("bench.whole_step", "--rows", "quantised"),), needs=NETWORKS),
)


def chosen(arguments: Sequence[str], parts: Sequence[Part]) -> list[Part]:
    """The parts named on the command line, or all if none is.

    Raises:
        SystemExit: a part does not exist, or its limit is not a positive number.
    """
    by_name, found = {part.name: part for part in parts}, []
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name not in by_name:
            raise SystemExit(f"{name!r} is not a part; choose from {', '.join(by_name)}")
        try:
            seconds = float(text or by_name[name].seconds)
        except ValueError:
            seconds = 0.0
        if not seconds > 0:
            raise SystemExit(f"{argument!r}: SECONDS must be a positive number; write {name} or {name}=SECONDS")
        found.append(dataclasses.replace(by_name[name], seconds=seconds))
    return found or list(parts)


def run(parts: Sequence[Part], path: Path, total: float, has: Callable[[str], bool] = has) -> bool:
    """Run `parts`, which write their rows to `path`. Returns whether none failed."""
    start, planned, sound = time.monotonic(), 0.0, True
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts:
            planned += part.seconds
            began = time.monotonic()
            end = min(start + planned, start + total)
            absent = [package for package in part.needs if not has(package)]
            absent += [command[0] for command in part.commands if not shutil.which(command[0])]
            row: dict[str, Any] = {"part": part.name, "table": "parts", "name": part.name, "allowed s": end - began}
            if absent:
                outcome = f"skipped, not installed: {', '.join(absent)}"
            elif end - began < 1:
                outcome = "not started, no time left"
            else:
                rows.append(path, row | {"outcome": "started, not finished"})
                print(f"\n=== {part.name}, at most {end - began:.0f} s", flush=True)
                outcome = _outcome(part, path, end, scratch)
                sound &= outcome == "passed"
            rows.append(path, row | {"s": time.monotonic() - began, "outcome": outcome})
            print(f"=== {part.name}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)
    return sound


def _outcome(part: Part, path: Path, end: float, scratch: str) -> str:
    failed = []
    environment = os.environ | part.environment | {rows.FILE: str(path), rows.PART: part.name}
    environment[rows.DEADLINE] = str(time.time() + end - time.monotonic())
    for command in part.commands:
        if EXTENSION.exists():
            environment["FASTNABLA_EXTENSION"] = str(EXTENSION)
        process = subprocess.Popen(
            [word.replace("{scratch}", scratch) for word in command], env=environment, start_new_session=True
        )
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"timed out, in: {_shortened(command)}"
        finally:
            _end(process)
        if process.returncode:
            failed.append(f"exit status {process.returncode} of: {_shortened(command)}")
    return f"failed, {'; '.join(failed)}" if failed else "passed"


def _end(process: subprocess.Popen) -> None:
    """End a part and all processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _shortened(command: Command) -> str:
    words = [word for word in command if not word.startswith(str(ROOT)) and word != PYTHON]
    return " ".join(words)[:80]


def folder_of_results() -> Path:
    """$OUT if set; otherwise bench/results, or a new temporary folder for a dry run."""
    if out := os.environ.get("OUT"):
        folder = Path(out).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return Path(tempfile.mkdtemp(prefix="dry-run-")) if rows.is_dry() else ROOT / "bench" / "results"


def main(arguments: Sequence[str] = (), parts: Sequence[Part] = PARTS, total: float = TOTAL) -> int:
    """Run the parts named by `arguments`; the exit status, 0 if nothing failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` blocks end the parts
    begun = time.monotonic()
    selected = chosen(arguments, parts)
    if rows.is_dry():
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    stem = f"{'dry-run' * rows.is_dry() or 'gpu'}_{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H%M}"
    path = folder_of_results() / f"{stem}.jsonl"
    print(f"rows: {path}; tables: {path.with_suffix('.md')}", flush=True)
    machine = subprocess.run(module("bench.machine"), env=os.environ | {rows.FILE: str(path), rows.PART: "machine"})
    if machine.returncode:
        return machine.returncode
    try:
        sound = run(selected, path, total - (time.monotonic() - begun))
    finally:
        print(path.with_suffix(".md").read_text(), flush=True)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
