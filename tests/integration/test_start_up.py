"""Command lines parse their arguments before they import torch, so that --help and mistakes are answered at once."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "peft", "matplotlib")


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
