"""Command lines start wherever they are started: with a notebook's variables, without a home, into a log file.

They parse their arguments before they import torch, so that --help and mistakes are answered at once.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_cli import QUICK
from tests.tokens import TOKENS, assert_no_tokens

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "diffusers", "transformers", "peft", "matplotlib")
COMMANDS = (
    "fastnabla.train",
    "fastnabla.sample",
    "fastnabla.evaluate",
    "fastnabla.export",
    "fastnabla.compare",
    "fastnabla.reproduce",
    "fastnabla.rewards.__main__",
    "fastnabla.testbed.__main__",
    "fastnabla.analytic.__main__",
    "fastnabla.analytic.compare",
    "fastnabla.analytic.reach",
)
NOTEBOOK = "module://matplotlib_inline.backend_inline"
AWKWARD = {"MPLBACKEND": NOTEBOOK, "PYTHONIOENCODING": "ascii", "TERM": "dumb", "COLUMNS": "40", "HOME": "/dev/null/x"}
PRESENT = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "TRITON_INTERPRET")


def awkward() -> dict[str, str]:
    """No home, no cache folders, no locale; a notebook's variables."""
    return {name: os.environ[name] for name in PRESENT if name in os.environ} | AWKWARD


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sample", "evaluate", "export", "compare"])
def test_help_imports_no_torch(module: str) -> None:
    code = (
        f"import sys, fastnabla.{module} as command\n"
        "try:\n    command.main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        f"sys.exit(' '.join(sorted(set(sys.modules) & set({HEAVY}))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m fastnabla" in done.stdout


@pytest.mark.slow
def test_commands_in_an_awkward_environment(tmp_path: Path) -> None:
    """In one process, for speed: training into a log file, in ASCII and without control characters, with a line per update;
    nothing is written outside the run. Then every command starts and chooses a backend."""
    code = (
        "import importlib, os, fastnabla.train\n"
        f"assert fastnabla.train.main({[*QUICK, '--updates=2', '--run=run-∇', '--tracker=tensorboard']}) == 0\n"
        f"for name in {COMMANDS}:\n"
        f"    os.environ['MPLBACKEND'] = {NOTEBOOK!r}\n"
        "    try:\n        importlib.import_module(name).main(['--help'])\n"
        "    except SystemExit as stop:\n        assert stop.code == 0, name\n"
        "    assert os.environ['MPLBACKEND'] == 'agg' or name == 'fastnabla.train', name\n"  # its help imports nothing
        "import matplotlib, torchmetrics.image.fid\n"
        "print(matplotlib.get_backend())"
    )
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=awkward() | TOKENS, stdout=log, stderr=subprocess.STDOUT)
    printed = (tmp_path / "log").read_bytes()
    assert done.returncode == 0, printed
    assert_no_tokens(tmp_path)  # the log is below it
    text = printed.decode("ascii")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    lines = re.findall(r"^update (\d)/2: reward \S+, loss \S+, \S+ s/update, 0:00:\d\d left$", text, re.MULTILINE)
    assert lines == ["1", "2"]
    assert (tmp_path / "run-∇" / "curves.png").is_file()
    assert text.count("usage: python -m fastnabla") == len(COMMANDS)
    assert text.splitlines()[-1] == "agg"


def test_a_notebook_s_own_backend_is_left_alone() -> None:
    code = (
        "import os, sys, types\n"
        "sys.modules['IPython'] = types.ModuleType('IPython')\n"
        "from fastnabla.utils.console import quiet_libraries\n"
        "quiet_libraries()\n"
        "print(os.environ['MPLBACKEND'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=awkward())
    assert done.stdout.strip() == NOTEBOOK, done.stderr


@pytest.mark.parametrize("folder", ["fastnabla", "docs", "bench"])
def test_pyplot_is_not_used(folder: str) -> None:
    """pyplot chooses a window system; figures are drawn without it."""
    users = [path for path in (ROOT / folder).rglob("*.py") if "pyplot" in path.read_text(encoding="utf-8")]
    assert not users


def test_a_batch_script_without_srun_runs_alone_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastnabla import train
    from fastnabla.training import command

    started = []
    monkeypatch.setattr(command, "run_command", lambda config, info: started.append(info.size) or 0)
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "4711"}.items():
        monkeypatch.setenv(name, value)
    assert train.main(["testbed", "--dry-run"]) == 0
    assert started == [1] and "runs alone, although SLURM_NTASKS = 4" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train.main(["testbed", "--dry-run"]) == 2
    assert "RANK = not set, WORLD_SIZE = 4" in capsys.readouterr().err
