"""Builds the package; its metadata is in pyproject.toml.

The folder `kernels/` is installed as `fastnabla.kernels`. `csrc/` is built into the shared library `fastnabla/_C.so`, which is
optional: it is built if torch can be imported (`pip install --no-build-isolation`) and there is a C++ compiler (CXX or g++).
CUDA support is added if there is an nvcc (in CUDA_HOME or PATH) of the same major CUDA version as torch.

Environment variables:
    FASTNABLA_CUDA: 1 fails unless CUDA support is built and its operations are registered; 0 skips it.
    FASTNABLA_WERROR: 1 treats warnings as errors.
    FASTNABLA_PTXAS: 1 prints the kernels' registers and spills.
    FASTNABLA_SANITIZE: 1 builds for the CPU with the address and undefined behaviour sanitizers.
    FASTNABLA_CUDA_ARCHITECTURES: architectures to build for, by default 80,90,100.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.c*") if path.suffix in (".cpp", ".cu"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.*h"))
# torch 2.11's stable ABI, the oldest supported: an extension built with a newer torch also runs with 2.11.
COMMON = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
ALL_WARNINGS = ["-Wall", "-Wextra"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]


class CannotBuild(Exception):
    """The extension cannot be built; the message says why."""


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(" ".join(command), done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise CannotBuild(f"{Path(command[0]).name} failed; its output is above")
    return done.stdout + done.stderr


def find_torch() -> ModuleType:
    if sys.platform != "linux":
        raise CannotBuild(f"{sys.platform} is not supported")
    try:
        import torch
    except ImportError as error:
        raise CannotBuild(f"{error}; install torch, then fastnabla with pip install --no-build-isolation") from None
    return torch


def find_compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CannotBuild("no C++ compiler was found; install g++, or set CXX")
    return compiler


def find_nvcc(torch_cuda: str | None) -> str:
    """Path of an nvcc that matches `torch_cuda`, the CUDA version of torch; None for a torch without CUDA, which any nvcc
    matches.

    Raises:
        CannotBuild: there is none, or CUDA support is switched off.
    """
    if os.environ.get("FASTNABLA_CUDA") == "0":
        raise CannotBuild("FASTNABLA_CUDA = 0")
    if os.environ.get("FASTNABLA_SANITIZE") == "1":
        raise CannotBuild("the sanitizers support only the CPU")
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")
    if nvcc is None:
        raise CannotBuild("nvcc was not found in CUDA_HOME or PATH")
    version = re.search(r"release (\d+)\.\d+", run(nvcc, "--version"))
    if version and torch_cuda and version[1] != torch_cuda.split(".")[0]:
        raise CannotBuild(
            f"{nvcc} has CUDA {version[0][8:]} and torch has {torch_cuda}; set CUDA_HOME to one of torch's major version"
        )
    return nvcc


def warnings() -> list[str]:
    return [*ALL_WARNINGS, *(["-Werror"] if os.environ.get("FASTNABLA_WERROR") == "1" else [])]


REGISTERED = """
import sys, torch
torch.ops.load_library(sys.argv[1])
names = ("append", "gather")
sys.exit(not all(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnabla::{name}", "CUDA") for name in names))
"""


class BuildExtension(build_ext):
    """Compiles the sources in parallel, for the CPU and if possible for CUDA, and links them."""

    def get_ext_filename(self, fullname: str) -> str:
        # Without Python's ABI tag: it is not a Python module but a library that torch loads, for any version of Python.
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        try:
            self.torch, self.compiler_path = find_torch(), find_compiler()
        except CannotBuild as error:
            self._give_up(error)
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        started = time.monotonic()
        try:
            try:
                self._build(ext, find_nvcc(self.torch.version.cuda))
                parts = "for CPU and CUDA"
            except CannotBuild as error:
                self._fail_if_required(error)
                self._build(ext, None)
                parts = f"for CPU, not for CUDA ({error})"
        except CannotBuild as error:
            self._give_up(error)
            return
        print(f"{ext.name}: built {parts} in {time.monotonic() - started:.0f} s")

    def _fail_if_required(self, error: CannotBuild) -> None:
        if os.environ.get("FASTNABLA_CUDA") == "1":
            raise SystemExit(f"FASTNABLA_CUDA = 1, but CUDA support cannot be built: {error}")

    def _give_up(self, error: CannotBuild) -> None:
        self._fail_if_required(error)
        print(f"fastnabla._C: not built; slower torch code will be used instead ({error})")
        self.extensions = []

    def _build(self, ext: Extension, nvcc: str | None) -> None:
        torch = Path(self.torch.__file__).parent
        common = [*COMMON, "-isystem", str(torch / "include")]
        sanitize = SANITIZE if os.environ.get("FASTNABLA_SANITIZE") == "1" else []
        host = [self.compiler_path, *common, "-fPIC", "-fvisibility=hidden", *warnings(), *sanitize]
        device = [nvcc, *common, *_nvcc_options(nvcc, self.compiler_path)] if nvcc else None
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)

        def compile_source(source: str) -> str:
            target = str(folder / f"{Path(source).name}.o")
            printed = run(*(device if source.endswith(".cu") else host), "-c", source, "-o", target)
            if "ptxas" in printed:
                print(printed)
            return target

        # CUDA sources first, because they take longest.
        sources = sorted(
            (s for s in ext.sources if device or not s.endswith(".cu")), key=lambda s: not s.endswith(".cu")
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_source, sources))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # torch is loaded before this library, so no rpath is needed. The CUDA runtime is linked statically, so that the
        # library loads without CUDA, and its symbols are hidden, so that they do not clash with torch's.
        link = ["--no-as-needed", "-ltorch", "--exclude-libs,ALL"]
        if nvcc:
            options = [option for part in link for option in (["-Xlinker", part] if part[1] == "-" else [part])]
            driver = [nvcc, "-ccbin", self.compiler_path, "-cudart", "static"]
        else:
            options = [f"-Wl,{part}" if part[1] == "-" else part for part in link]
            driver = [self.compiler_path, *sanitize]
        # Link under a temporary name: a previous library is replaced only by one that works.
        linked = output.with_name(f"{output.name}.new")
        try:
            run(*driver, "-shared", *objects, f"-L{torch / 'lib'}", *options, "-o", str(linked))
            if nvcc and os.environ.get("FASTNABLA_CUDA") == "1":
                run(sys.executable, "-c", REGISTERED, str(linked))
            linked.replace(output)
        finally:
            linked.unlink(missing_ok=True)


def _nvcc_options(nvcc: str, compiler: str) -> list[str]:
    value = os.environ.get("FASTNABLA_CUDA_ARCHITECTURES", "80,90,100")
    wanted = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in wanted):
        raise CannotBuild(
            f"FASTNABLA_CUDA_ARCHITECTURES = {value!r}: must be numbers with commas between them, such as 80,90"
        )
    supported = run(nvcc, "--list-gpu-code").split()
    architectures = [a for a in wanted if f"sm_{a}" in supported]
    if not architectures:
        raise CannotBuild(f"{nvcc} supports none of the architectures {', '.join(f'sm_{a}' for a in wanted)}")
    codes = [f"arch=compute_{a},code=sm_{a}" for a in architectures]
    codes.append(f"arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")  # PTX for newer architectures
    options = ["-ccbin", compiler, "--threads", "0"]
    options += ["-Werror", "all-warnings"] if "-Werror" in warnings() else []
    options += [option for code in codes for option in ("-gencode", code)]
    options += ["-Xcompiler", ",".join(["-fPIC", "-fvisibility=hidden", *warnings()])]
    return [*options, "-Xptxas", "-v"] if os.environ.get("FASTNABLA_PTXAS") == "1" else options


setup(
    packages=[*find_packages(include=["fastnabla", "fastnabla.*"]), "fastnabla.kernels"],
    package_dir={"fastnabla.kernels": "kernels"},
    include_package_data=False,
    package_data={"fastnabla.objective": ["README.md"], "fastnabla.testbed": ["data/**"]},
    ext_modules=[Extension("fastnabla._C", SOURCES, depends=HEADERS)],
    cmdclass={"build_ext": BuildExtension},
)
