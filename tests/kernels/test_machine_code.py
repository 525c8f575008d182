"""Kernels as they are compiled for GPUs that need not be there: no spills, wide accesses, and the committed table."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import triton

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "bench" / "results" / "machine_code.md"
ARCHITECTURES = (80, 90, 100)
KERNELS = {  # compiled anew in every variant of a case; sum_tiles and scale are shared
    "forward_balance": {"forward_balance"},
    "reverse_cotangent": {"reverse_cotangent"},
    "reverse_balance": {"reverse_balance"},
    "reference_cotangent": {"reference_cotangent"},
    "reference_balance": {"reference_balance"},
    "gaussian_log_prob": {"gaussian_log_prob", "gaussian_log_prob_backward"},
    "guided_step": {"guided_step"},
}
NORMALISATION = {  # always in channels-last; sums and moments are float32 in every variant
    "bf16": {"tile_moments", "group_moments", "norm_silu", "tile_sums", "group_means", "norm_silu_backward"},
    "fp32": {"tile_moments", "norm_silu", "tile_sums", "norm_silu_backward"},
}
VARIANTS = ("bf16", "bf16, outputs channels-last", "fp32")
SUMS = ("sum_tiles", "tile_moments", "group_moments", "tile_sums", "group_means")
"""Kernels that write sums of tiles only."""


class Row(NamedTuple):
    case: str
    kernel: str
    architecture: int
    spilled: int
    loads: dict[int, int]
    """Instructions by bytes a thread."""
    stores: dict[int, int]


def parse(text: str) -> list[Row]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line] for line in lines]
    assert names == ["case", "kernel", "sm", "registers", "shared", "spilled", "loads", "stores"]
    return [
        Row(case, kernel, int(architecture), int(spilled), widths(loads), widths(stores))
        for case, kernel, architecture, _, _, spilled, loads, stores in rows
    ]


def widths(cell: str) -> dict[int, int]:
    return {int(width): int(count) for count, width in re.findall(r"(\d+) × (\d+)", cell)}


@pytest.fixture(scope="module")
def output() -> str:
    """What `python -m bench.machine_code` prints; it takes half a minute."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.machine_code"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rows(output) -> list[Row]:
    return parse(output)


def test_every_kernel_is_there(rows):
    found = {(row.case, row.kernel, row.architecture) for row in rows}
    assert len(found) == len(rows)
    expected = {
        (f"{case}, {variant}", kernel, architecture)
        for case, kernels in KERNELS.items()
        for kernel in kernels
        for variant in VARIANTS
        for architecture in ARCHITECTURES
    } | {
        (f"group_norm_silu, {variant}", kernel, architecture)
        for variant, kernels in NORMALISATION.items()
        for kernel in kernels
        for architecture in ARCHITECTURES
    }
    assert expected <= found
    others = {"sum_tiles", "scale"}
    assert {row.kernel for row in rows} == set().union(*KERNELS.values(), *NORMALISATION.values(), others)


def test_no_spills(rows):
    assert not [row for row in rows if row.spilled]


def test_contiguous_tensors_are_accessed_by_16_bytes(rows):
    """The rest are coefficients and partial sums, 4 bytes each, and the step index, 8."""
    for row in rows:
        if "channels-last" not in row.case and row.kernel not in SUMS:
            assert max(row.loads) == max(row.stores) == 16, row
        assert min(row.loads) >= 4, row


def test_activations_are_read_by_16_bytes(rows):
    for row in rows:
        if row.kernel in ("tile_moments", "tile_sums"):
            assert max(row.loads) == 16, row


def test_channels_last_outputs_are_accessed_by_8_bytes(rows):
    """A position's four channels in bf16. Of contiguous tensors in the same call: still 16 bytes."""
    for row in rows:
        if "channels-last" in row.case:
            assert max(row.loads) == 16, row
            assert min(row.stores) >= 4 and min(row.loads) >= 4, row
            assert row.loads[8] + row.stores.get(8, 0) > 1, row  # one load is of the step index


def test_committed_table(output):
    committed = COMMITTED.read_text()
    version = re.search(r"Compiled by Triton (\S+)", committed)[1]
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, {triton.__version__} is installed")
    assert output == committed, "kernels have changed; rewrite the table: `python -m bench.machine_code --write`"
