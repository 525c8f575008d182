"""The configuration and the command line are read without torch and the libraries above it."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "scipy", "matplotlib", "pydantic")
THEN = f"""
import atexit, sys
atexit.register(lambda: print("imported:", *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("from fastnabla.config import presets, train; train.from_json(train.to_json(train.TrainConfig()))", 0, ""),
        ("from fastnabla.train import parse; parse(['sd15-aesthetic', '--method', 'draft', '--direct.k=2'])", 0, ""),
        ("from fastnabla.train import main; main(['testbed', '--help'])", 0, "--objective.reward-gradient"),
        ("from fastnabla.train import main; main(['--help'])", 0, "sdxl-pickscore"),
        ("from fastnabla.train import main; main(['--sampler.step', '3'])", 2, "--sampler.step"),
        ("from fastnabla.train import main; sys.exit(main(['--sampler.steps=1']))", 2, "sampler.steps = 1"),
        ("from fastnabla.train import main; sys.exit(main(['--direct.k=2']))", 2, "direct.k = 2"),
    ],
    ids=["read", "parse", "help", "presets", "mistyped field", "bad value", "setting of another method"],
)
def test_torch_is_not_imported(code: str, status: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", THEN + code], capture_output=True, text=True)
    assert done.stderr.endswith("imported:\n") and done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
