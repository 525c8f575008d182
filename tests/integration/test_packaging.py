"""What is installed, and that the folder `kernels/` is never taken for Hugging Face's package of that name."""

import glob
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels" / "__init__.py"
without_genuine = pytest.mark.skipif(
    any(importlib.metadata.distributions(name="kernels")), reason="Hugging Face's kernels is installed"
)
METADATA = """
import setuptools
from distutils.core import run_setup

distribution = run_setup("setup.py", stop_after="config")
build = distribution.get_command_obj("build_py")
build.ensure_finalized()
print(distribution.get_name(), distribution.get_version(), distribution.python_requires)
print(*distribution.packages)
print(*[f"{package}/{name}" for package, _, _, names in build.data_files for name in names])
"""


def run(code: str, *path: Path, cwd: Path = ROOT) -> list[str]:
    """The lines that `python -c code` prints in `cwd`, which heads its sys.path; `path` follows."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def genuine(tmp_path):
    """A folder with a package `kernels` that is not ours, has a submodule and imports it."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from kernels.layer import get_kernel\n")
    (package / "layer.py").write_text("def get_kernel():\n    return 'genuine'\n")
    return tmp_path


@pytest.mark.parametrize("at_root", [True, False], ids=["root", "elsewhere"])
def test_our_kernels_have_our_name(at_root, tmp_path):
    code = "import fastnabla.kernels as k; print(k.__name__, k.__file__, k.__path__)"
    expected = f"fastnabla.kernels {KERNELS} {[str(KERNELS.parent)]}"
    assert run(code, cwd=ROOT if at_root else tmp_path) == [expected]


def test_kernels_is_not_found_elsewhere(tmp_path):
    (found,) = run("import importlib.util as u; print(u.find_spec('kernels'))", cwd=tmp_path)
    assert str(ROOT) not in found


@without_genuine
def test_kernels_is_empty_at_the_root():
    """Nothing can be imported from it, whatever the folder holds."""
    modules = [path.stem for path in KERNELS.parent.iterdir() if path != KERNELS]
    statements = ["from kernels import get_kernel", *(f"import kernels.{name}" for name in [*modules, "layer"])]
    code = (
        "import sys\n"
        f"for statement in {statements}:\n"
        "    try:\n"
        "        exec(statement)\n"
        "    except ImportError as error:\n"
        "        print(type(error).__name__)\n"
        "print(sys.modules['kernels'].__version__)\n"
    )
    assert run(code) == ["ImportError", *["ModuleNotFoundError"] * (len(statements) - 1), "0"]


@pytest.mark.parametrize("before", [(), (ROOT,)], ids=["root once", "root twice"])
def test_genuine_kernels_is_found_behind_the_root(genuine, before):
    code = "import kernels, kernels.layer as layer; print(layer.get_kernel(), kernels.get_kernel(), kernels.__file__)"
    assert run(code, *before, genuine) == [f"genuine genuine {genuine / 'kernels' / '__init__.py'}"]


@pytest.mark.slow
@without_genuine
def test_libraries_that_look_for_kernels_import_at_the_root():
    """transformers imports what is called `kernels` to see its version; these are the imports that make it. This process has
    the root in its path, too."""
    assert importlib.util.find_spec("kernels").origin == str(KERNELS)
    import bitsandbytes  # noqa: F401
    import diffusers.utils
    import peft  # noqa: F401
    import transformers.utils
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    assert not transformers.utils.is_kernels_available() and not diffusers.utils.is_kernels_available()


def test_metadata_packages_and_data():
    import fastnabla

    name, packages, data = run(METADATA)[-3:]
    assert name == f"fastnabla {fastnabla.__version__} >=3.11"
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("fastnabla/**/__init__.py")}
    assert set(packages.split()) == folders | {"fastnabla.kernels"}
    root = ROOT / "fastnabla" / "testbed" / "data"
    files = map(Path, glob.glob(str(root / "**"), recursive=True))  # unlike rglob, follows the link to the VAE
    shipped = {f"fastnabla.testbed/data/{path.relative_to(root)}" for path in files if path.is_file()}
    assert set(data.split()) == shipped | {"fastnabla.objective/README.md"}


def test_constraints_name_no_build():
    """A local label such as "+cpu" would forbid the other builds of torch."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line for line in pins)
