"""The extension: how it is built and loaded, what its operations refuse, and its headers."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution, Extension
from torch import Tensor

from fastnabla.trajectories import buffer_ops, buffer_torch
from tests.checks import randn
from tests.trajectories.test_buffer_ops import COMPILED, Case, assert_same_everywhere

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
NVCC = shutil.which("nvcc")
OPERATIONS = pytest.mark.parametrize(
    "operations", [pytest.param(torch.ops.fastnabla, marks=COMPILED), buffer_torch], ids=["compiled", "torch"]
)


RESULTS = [f"out.{name}" for name in buffer_ops.FIELDS]


def arguments(operation: str, **case) -> tuple[dict, object]:
    """Valid ones by name, with outputs in 8 bits; and the slabs with what is around them."""
    built, x, slots = Case(**{"block": 64, **case}).build("cpu"), randn(2, 3, 17), torch.tensor([2, 0])
    index = torch.tensor([5, 0, 5])
    kinds = {
        "append": ("slots step x output x_next", (slots, 1, x, x, x)),
        "gather": (
            f"steps prompt reward index {' '.join(RESULTS)}",
            (*built.numbers, index, *buffer_ops.gathered(index, (3, 17), torch.float32)),
        ),
    }
    names, rest = kinds[operation]
    return dict(
        zip(f"states outputs scales state_at output_at {names}".split(), (*built.slabs, *rest), strict=True)
    ), built


def call(operations, operation: str, named: dict) -> None:
    """The operation, of `torch.ops.fastnabla` or `buffer_torch`, which returns what the other writes to `out`."""
    given = [value for name, value in named.items() if name not in RESULTS]
    if operation == "gather":
        given.append(torch.float32 if operations is buffer_torch else [named[name] for name in RESULTS])
    getattr(operations, operation)(*given)


ALL = ("append", "gather")
GATHERED = ("steps", "prompt", "reward", "index")
INDICES = [
    *(("append", "slots", torch.tensor(bad)) for bad in ([0, 3], [-1, 0], [1, 1])),
    *(("append", "step", step) for step in (-1, 4)),
    *((op, "state_at", torch.full((3, 5), 5).int()) for op in ALL),
    *((op, "output_at", torch.full((3, 4), bad).int()) for op in ALL for bad in (2, -2)),
    *(("gather", "index", torch.tensor(bad)) for bad in ([0, 6, 0], [-1, 0, 0], [0, 0, 2**62])),
    *(("gather", name, torch.full((3, 5 - i), -1).int()) for i, name in enumerate(("state_at", "output_at"))),
    *(("gather", "steps", torch.full((3, 2), bad)) for bad in (4, -1)),
]
KINDS = [
    *(("append", name, Tensor.double) for name in ("states", "outputs", "x", "output")),
    *((op, name, Tensor.long) for op in ALL for name in ("state_at", "output_at", "scales")),
    ("append", "slots", Tensor.int),
    ("append", "x_next", Tensor.int),
    *(("gather", name, Tensor.double) for name in GATHERED),
    *(("append", name, lambda t: t[:-1]) for name in ("outputs", "scales", "state_at", "x", "output")),
    *(("gather", name, lambda t: t[:-1]) for name in GATHERED[:-1]),
    *(("append", name, lambda t: t[..., None]) for name in ("slots", "x", "output", "state_at", "scales")),
    *(("gather", name, lambda t: t[..., None]) for name in GATHERED),
    *(("append", name, lambda t: t.mT.contiguous().mT) for name in ("x", "output")),
    *((op, name, lambda t: t.mT.contiguous().mT) for op in ALL for name in ("states", "outputs", "state_at")),
    *((op, "scales", change) for op in ALL for change in (lambda t: None, lambda t: t[..., :0])),
    *(("gather", name, Tensor.double) for name in RESULTS),
    *(("gather", name, change) for name in RESULTS for change in (lambda t: t[:-1], lambda t: t[..., None])),
    *(("gather", name, lambda t: t.mT.contiguous().mT) for name in RESULTS[:3]),
    *(("gather", name, lambda t: t.repeat(2)[::2]) for name in RESULTS[3:]),
]


@OPERATIONS
@pytest.mark.parametrize(("operation", "name", "bad"), INDICES)
def test_indices_out_of_range(operations, operation, name, bad):
    """An error that names the argument, and nothing is written."""
    assert_refused(operations, operation, name, bad)


@COMPILED
@pytest.mark.parametrize(("operation", "name", "change"), KINDS)
def test_wrong_kinds_of_arguments(operation, name, change):
    assert_refused(torch.ops.fastnabla, operation, name, change(arguments(operation)[0][name]))


def assert_refused(operations, operation: str, name: str, bad) -> None:
    changed, built = arguments(operation)
    with pytest.raises(RuntimeError, match=rf"^{name}: expected"):
        call(operations, operation, changed | {name: bad})
    assert_same_everywhere(built, Case(block=64).build("cpu"))
    call(operations, operation, changed)  # and nothing else was wrong


@pytest.mark.gpu
@pytest.mark.skipif(not buffer_ops.CUDA_AVAILABLE, reason="the extension is not built for CUDA")
@pytest.mark.parametrize("operation", ALL)
def test_one_argument_on_another_device(operation):
    on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments(operation)[0].items()}
    call(torch.ops.fastnabla, operation, on_gpu)
    for name, value in on_gpu.items():
        if isinstance(value, Tensor) and name not in ("x", "index"):  # which say where it is to run
            with pytest.raises(RuntimeError, match=rf"^{name}: expected a tensor on cuda:0"):
                call(torch.ops.fastnabla, operation, on_gpu | {name: value.cpu()})


@pytest.mark.slow
@COMPILED
def test_operations_keep_to_their_schemas():
    """They change what they say that they change, and shapes are known without running them."""

    def prepared(operation: str) -> dict:
        named, built = arguments(operation)
        for slab in built.whole:
            slab.fill_(1)  # NaNs are not equal to each other
        return named

    gather = prepared("gather")
    calls = {
        "append": tuple(prepared("append").values()),
        "gather": (*(v for name, v in gather.items() if name not in RESULTS), [gather[name] for name in RESULTS]),
    }
    for name, values in calls.items():
        torch.library.opcheck(getattr(torch.ops.fastnabla, name).default, values)


# ---- built, loaded, or missing


def build_script(monkeypatch) -> ModuleType:
    """setup.py, which sets nothing up."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


FAKE_COMPILER = """#!/bin/sh
case "$*" in
    *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    *--list-gpu-code*) echo sm_90 ;;
    *" -c "*) {compile} ;;
esac
while [ "$1" != -o ] && [ $# -gt 0 ]; do shift; done
[ $# -eq 0 ] || echo nothing > "$2"
"""
ARCHITECTURES = {"no such architecture": "1", "a letter": "90a", "no number": ""}
NO_CUDA = {
    "no nvcc": r"nvcc was not found in CUDA_HOME or PATH",
    "another version": r"bin/nvcc has CUDA 13\.0 and torch has 12\.8; set CUDA_HOME",
    "nvcc fails midway": r"nvcc failed; its output is above",
    "no such architecture": r"bin/nvcc supports none of the architectures sm_1",
    "a letter": r"FASTNABLA_CUDA_ARCHITECTURES = '90a': must be numbers with commas",
    "no number": r"FASTNABLA_CUDA_ARCHITECTURES = '': must be numbers with commas",
    "cannot be loaded": r"python\S* failed; its output is above",
}


@pytest.mark.slow
@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("case", NO_CUDA)
def test_a_cuda_part_that_cannot_be_built(case, required, tmp_path, monkeypatch, capfd):
    """FASTNABLA_CUDA=1 then fails and leaves alone what was there; else the rest is built, and one line says why.
    Compilers are doubles that write a file, so what is linked cannot be loaded."""
    monkeypatch.setenv("FASTNABLA_CUDA_ARCHITECTURES", ARCHITECTURES.get(case, "80, 90"))
    script = build_script(monkeypatch)
    for name in ("c++", "nvcc"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        compiler = tmp_path / "bin" / name
        fails = name == "nvcc" and case == "nvcc fails midway"
        compiler.write_text(FAKE_COMPILER.format(compile="exit 1" if fails else ":"))
        compiler.chmod(0o755)
    if case == "no nvcc":
        (tmp_path / "bin/nvcc").unlink()
    for name in ("CUDA_HOME", "FASTNABLA_SANITIZE", "FASTNABLA_CUDA", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin" if case != "no nvcc" else str(tmp_path / "bin"))
    monkeypatch.setenv("CXX", str(tmp_path / "bin/c++"))
    monkeypatch.setattr(torch.version, "cuda", "12.8" if case == "another version" else "13.0")
    extension = Extension("fastnabla._C", script.SOURCES)
    command = script.BuildExtension(Distribution({"ext_modules": [extension]}))
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    command.ensure_finalized()
    built = tmp_path / "lib/fastnabla/_C.so"
    built.parent.mkdir(parents=True)
    built.write_text("of before")
    if required:
        monkeypatch.setenv("FASTNABLA_CUDA", "1")
        with pytest.raises(
            SystemExit, match=rf"^FASTNABLA_CUDA = 1, but CUDA support cannot be built: .*{NO_CUDA[case]}"
        ):
            command.run()
        assert built.read_text() == "of before"
        return
    command.run()
    assert built.read_text() == "nothing\n"
    printed = capfd.readouterr().out
    if case == "cannot be loaded":  # which only loading it shows
        assert "built for CPU and CUDA in" in printed
    else:
        assert re.search(rf"built for CPU, not for CUDA \(.*{NO_CUDA[case]}", printed)


@pytest.mark.parametrize("available", [True, False])
def test_require_cuda(available, monkeypatch):
    monkeypatch.setattr(buffer_ops, "CUDA_AVAILABLE", available)
    monkeypatch.setattr(buffer_ops, "WHY_NOT", "" if available else "the extension is built without its CUDA part")
    if available:
        return buffer_ops.require_cuda()
    with pytest.raises(
        RuntimeError, match=r"on CUDA are not registered: the extension is built without its CUDA part\. Bui"
    ):
        buffer_ops.require_cuda()


@pytest.mark.slow
@pytest.mark.skipif(not (NVCC and COMPILER), reason="needs nvcc and a C++ compiler")
def test_cuda_code_compiles_without_warnings_or_spills(tmp_path, monkeypatch):
    """As in setup.py, for one architecture."""
    script = build_script(monkeypatch)
    monkeypatch.setenv("FASTNABLA_PTXAS", "1")
    monkeypatch.setenv("FASTNABLA_WERROR", "1")
    monkeypatch.delenv("LD_PRELOAD", raising=False)  # sanitizers, which nvcc does not stand
    monkeypatch.setenv("FASTNABLA_CUDA_ARCHITECTURES", "90")
    options = [*script.COMMON, "-isystem", str(Path(torch.__file__).parent / "include")]
    options += script._nvcc_options(NVCC, COMPILER)
    sources = sorted(Path("csrc").glob("*.cu"))
    assert sources
    for source in sources:
        command = [NVCC, *options, "-c", str(source), "-o", str(tmp_path / "object.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed
        assert "warning" not in printed
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", printed)
        assert spills, "ptxas printed nothing"
        assert set(spills) == {"0"}, printed


USE = """
import logging
logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
import torch
from fastnabla.trajectories import buffer_ops
from fastnabla.trajectories.buffer import TrajectoryBuffer

print("available:", buffer_ops.AVAILABLE)
print("registered:", hasattr(torch.ops.fastnabla, "gather"))
for block in (None, 64):
    buffer = TrajectoryBuffer(2, 4, 2, (3, 5), torch.bfloat16, output_block=block)
    slots = buffer.reserve(torch.tensor([[3, 0], [3, 2]]), torch.arange(2))
    x = torch.arange(2 * 5 * 15.0).view(2, 5, 3, 5)
    for step in range(4):
        buffer.append(slots, step, x[:, step], x[:, step + 1], x[:, step + 1])
    batch = buffer.gather(buffer.transitions(), torch.float32)
    print(batch.step_index.tolist(), batch.x.sum().item(), batch.model_output.sum().item())
print("done", flush=True)
buffer_ops.require_cuda()
"""


def use(**environment: str) -> subprocess.CompletedProcess:
    """What a fresh process without a GPU prints when it uses the buffer. Then it asks for CUDA, as a script would."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), done.stderr
    return done


@pytest.mark.slow
@COMPILED
def test_with_and_without_the_extension(tmp_path):
    """The same numbers; and without it one warning, which says why and how to build it. Whoever asks for CUDA is refused where it
    is not registered."""
    with_it, without = use(), use(FASTNABLA_EXTENSION=str(tmp_path / "missing.so"))
    assert with_it.stdout.startswith("available: True\nregistered: True\n")
    assert without.stdout.startswith("available: False\nregistered: False\n")
    assert with_it.stdout.splitlines()[2:] == without.stdout.splitlines()[2:]
    warnings = [line for line in without.stderr.splitlines() if " fastnabla: " in line]
    assert len(warnings) == 1
    if buffer_ops.CUDA_AVAILABLE:
        assert with_it.returncode == 0, with_it.stderr
    else:
        assert with_it.returncode == 1 and "not registered" in with_it.stderr
    said = r"RuntimeError: .*not registered: the extension \S+missing\.so cannot be loaded"
    assert without.returncode == 1 and re.search(said, without.stderr)
    assert re.match(r"WARNING fastnabla: The extension \S+missing\.so cannot be loaded \(.*pip install", warnings[0])


# ---- the headers, on numbers that would need too much memory elsewhere


@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
def test_headers(tmp_path):
    """Offsets past 2³¹ and 2³² elements, and roundings where binary16 overflows and underflows."""
    size, slots = 4 * 128 * 128, 40000
    rounding = {"65519.0f": 0x7BFF, "65520.0f": 0x7C00, "-0x1p-25f": 0x8000, "0x1.8p-24f": 2, "0x1.000002p-25f": 1}
    expected = {
        **{f"row_offset({{{n * size}, {size}}}, {slots - 1}, {n - 1})": (slots * n - 1) * size for n in (1, 14, 101)},
        **{f"transition_of({2**33 * k + k - 1}, {k}).slot": 2**33 for k in (1, 7, 101)},
        **{f"transition_of({2**33 * k + k - 1}, {k}).position": k - 1 for k in (1, 7, 101)},
        **{f"divide_up({e}, 4096)": -(-e // 4096) for e in (2**31 - 1, 2**30 + 1, 4096)},
        **{f"block_of({2**31 - 1}, {-(-(2**31 - 1) // block)})": block for block in (64, 128, 256)},
        **{f"convert<Half>({x}).bits": bits for x, bits in rounding.items()},
        "convert<BFloat16>(-3.4e38f).bits": 0xFF80,
    }
    body = "\n".join(f'std::printf("%lld\\n", static_cast<long long>({expression}));' for expression in expected)
    includes = '#include <cstdio>\n#include "convert.h"\n#include "index.h"\nusing namespace fastnabla;\n'
    (tmp_path / "program.cpp").write_text(f"{includes}int main() {{\n{body}\n}}\n")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *flags, "program.cpp", "-o", "program"], cwd=tmp_path, check=True)
    printed = subprocess.run(["./program"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert dict(zip(expected, map(int, printed.split()), strict=True)) == expected
