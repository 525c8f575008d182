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
VARIANTS = ("bf16", "bf16, outputs channels-last", "fp32")
WHOLE, PART, BF16 = 90, "guided_step", VARIANTS[:2]
"""All cases are compiled for this architecture with outputs in bf16, whose states are in fp32; this case for all architectures,
and in fp32 as well."""
COMPILES = f"""
from bench.machine_code import CASES, compile_all, table
codes = [*compile_all({WHOLE}, CASES, {BF16}), *compile_all({WHOLE}, ["{PART}"], ["{VARIANTS[2]}"])]
for architecture in {set(ARCHITECTURES) - {WHOLE}}:
    codes += compile_all(architecture, ["{PART}"], {BF16[:1]})
print(table(codes), end="")
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


def is_compiled(case: str, variant: str, architecture: int) -> bool:
    """Whether `COMPILES` does."""
    if case == PART:
        return architecture == WHOLE or variant == BF16[0]
    return architecture == WHOLE and variant in BF16


@pytest.fixture(scope="module")
def output() -> str:
    """What `python -m bench.machine_code` prints of these architectures, cases and variants."""
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
    of_cases = {(case, variant, kernel) for case in KERNELS for kernel in KERNELS[case] for variant in VARIANTS}
    of_cases |= {("group_norm_silu", variant, k) for variant, kernels in NORMALISATION.items() for k in kernels}
    expected = {
        (f"{case}, {variant}", kernel, architecture)
        for case, variant, kernel in of_cases
        for architecture in ARCHITECTURES
        if is_compiled(case, variant, architecture)
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


def test_committed_table_has_every_architecture():
    found = {(row.case, row.kernel, row.architecture) for row in parse(COMMITTED.read_text())}
    assert found == {(case, kernel, architecture) for case, kernel, _ in found for architecture in ARCHITECTURES}


def test_committed_table(output):
    committed = COMMITTED.read_text()
    version = re.search(r"Compiled by Triton (\S+)", committed)[1]
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, {triton.__version__} is installed")
    row = re.compile(r"\| (\w+), ([^|]+) \|[^|]+\| (\d+) \|")
    rows = ((line, row.match(line)) for line in committed.splitlines())
    kept = [line for line, found in rows if not found or is_compiled(found[1], found[2], int(found[3]))]
    assert output.splitlines() == kept, (
        "kernels have changed; rewrite the table: `python -m bench.machine_code --write`"
    )
