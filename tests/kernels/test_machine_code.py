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
WHOLE, PART = 90, "guided_step"
"""The architecture that all kernels are compiled for, and the case that is compiled for all architectures."""
COMPILES = f"""
from bench.machine_code import ARCHITECTURES, CASES, compile_all, table
cases = {{architecture: CASES if architecture == {WHOLE} else ["{PART}"] for architecture in ARCHITECTURES}}
print(table([code for architecture in cases for code in compile_all(architecture, cases[architecture])]), end="")
"""
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
    """What `python -m bench.machine_code` prints of these architectures and cases."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["compiled", "committed"])
def rows(output, request) -> list[Row]:
    return parse(output if request.param == "compiled" else COMMITTED.read_text())


def test_every_kernel_is_there(rows):
    found = {(row.case, row.kernel, row.architecture) for row in rows}
    assert len(found) == len(rows)
    expected = {
        (f"{case}, {variant}", kernel, WHOLE)
        for case, kernels in KERNELS.items()
        for kernel in kernels
        for variant in VARIANTS
    } | {
        (f"group_norm_silu, {variant}", kernel, WHOLE)
        for variant, kernels in NORMALISATION.items()
        for kernel in kernels
    }
    expected |= {(f"{PART}, {variant}", PART, architecture) for variant in VARIANTS for architecture in ARCHITECTURES}
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


def test_committed_table_has_every_architecture():
    found = {(row.case, row.kernel, row.architecture) for row in parse(COMMITTED.read_text())}
    assert found == {(case, kernel, architecture) for case, kernel, _ in found for architecture in ARCHITECTURES}


def test_committed_table(output):
    committed = COMMITTED.read_text()
    version = re.search(r"Compiled by Triton (\S+)", committed)[1]
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, {triton.__version__} is installed")
    left_out = re.compile(rf"\| (?!{PART},)[^|]*\|[^|]*\| (?!{WHOLE} )\d+ \|")
    kept = [line for line in committed.splitlines() if not left_out.match(line)]
    assert output.splitlines() == kept, (
        "kernels have changed; rewrite the table: `python -m bench.machine_code --write`"
    )
