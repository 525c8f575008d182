"""Compiles every kernel as it is launched, without a GPU, and inspects the machine code.

    python -m bench.machine_code [--write]

prints for sm_80, sm_90 and sm_100: registers, shared memory, spilled bytes, and the widths of global memory accesses.
`--write` puts the table into bench/results/machine_code.md. The launches are those of `fastnabla.kernels`, on CPU tensors of
Stable Diffusion 1.5's shape, with execution replaced by compilation. Neither a GPU nor nvcc is needed: Triton includes an
assembler and a disassembler.
"""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.backends.nvidia.driver import CudaDriver

from fastnabla.kernels.forward_balance import forward_balance
from fastnabla.kernels.gaussian_log_prob import gaussian_log_prob
from fastnabla.kernels.group_norm_silu import group_norm_silu, group_norm_silu_backward
from fastnabla.kernels.guided_step import guided_step
from fastnabla.kernels.reference_balance import reference_balance
from fastnabla.kernels.reference_cotangent import reference_cotangent
from fastnabla.kernels.reverse_balance import reverse_balance
from fastnabla.kernels.reverse_cotangent import reverse_cotangent

TABLE = Path(__file__).parent / "results" / "machine_code.md"
ARCHITECTURES = (80, 90, 100)
ROWS, SHAPE = 16, (4, 64, 64)
WEIGHTS = {"guidance_scale": 5.0, "beta": 1.0, "gamma": "alpha_bar", "prior_weight": 1.0}


@dataclasses.dataclass(frozen=True, slots=True)
class MachineCode:
    """One kernel, compiled for one architecture."""

    case: str
    kernel: str
    architecture: int
    registers: int
    """Registers of a thread."""
    shared: int
    """Bytes of shared memory of a program."""
    spilled: int
    """Bytes of registers that a thread spills to local memory."""
    loads: tuple[tuple[int, int], ...]
    """(bytes of a thread, number of instructions), widest first."""
    stores: tuple[tuple[int, int], ...]


def _states(copies: int = 1, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.zeros(copies * ROWS, *SHAPE, dtype=dtype).to(memory_format=layout)


def _forward_balance(dtype: torch.dtype, last: bool) -> None:
    output, flow = _states(2, dtype, last).requires_grad_(), _states(1, dtype, last).requires_grad_()
    reference, x, table, steps = _states(2, dtype, last), _states(), *_steps()
    loss, _ = forward_balance(
        *(output, reference, x, x, table, steps, x, flow, x), by_sigma=True, trust_region_weight=1.0, **WEIGHTS
    )
    loss.sum().backward()


def _reverse_cotangent(dtype: torch.dtype, last: bool) -> None:
    output, x = _states(2, dtype, last), _states()
    reverse_cotangent(output, x, x, *_steps(), x, **WEIGHTS)


def _reverse_balance(dtype: torch.dtype, last: bool) -> None:
    output, flow, x = _states(2, dtype, last), _states(1, dtype, last).requires_grad_(), _states()
    reverse_balance(
        x, x, *_steps(), flow, x, (output, output), by_sigma=True, at_prediction=True, **WEIGHTS
    ).sum().backward()


def _reference_cotangent(dtype: torch.dtype, last: bool) -> None:
    output, flow, x = _states(2, dtype, last), _states(1, dtype, last), _states()
    reference_cotangent(output, *_steps(), x, flow, x, guidance_scale=5.0, beta=1.0, gamma="alpha_bar")


def _reference_balance(dtype: torch.dtype, last: bool) -> None:
    flow, flow_next, x = _states(1, dtype, last).requires_grad_(), _states(1, dtype, last), _states()
    settings = {"beta": 1.0, "gamma": "alpha_bar", "by_sigma": True, "at_prediction": True}
    reference_balance(x, *_steps(), flow, x, flow_next, x, **settings).sum().backward()


def _gaussian_log_prob(dtype: torch.dtype, last: bool) -> None:
    output, x = _states(2, dtype, last).requires_grad_(), _states().requires_grad_()
    gaussian_log_prob(output, x, x, *_steps(), guidance_scale=5.0).sum().backward()


def _guided_step(dtype: torch.dtype, last: bool) -> None:
    output, x = _states(2, dtype, last), _states()
    guided_step(output, x, x, *_steps(), guidance_scale=5.0)


def _group_norm_silu(dtype: torch.dtype, last: bool) -> None:
    """Always in channels-last."""
    x, norm = (
        torch.zeros(1, 128, 64, 64, dtype=dtype).to(memory_format=torch.channels_last),
        torch.zeros(128, dtype=dtype),
    )
    y, mean, rstd = group_norm_silu(x, norm, norm, 32, 1e-6)
    with torch.no_grad():
        group_norm_silu_backward(y, x, mean, rstd, norm, norm, 32, 1e-6, x)


def _steps() -> tuple[Tensor, Tensor]:
    return torch.zeros(50, 8), torch.zeros(ROWS, dtype=torch.int64)


CASES: dict[str, Callable[[torch.dtype, bool], None]] = {
    "forward_balance": _forward_balance,
    "reverse_cotangent": _reverse_cotangent,
    "reverse_balance": _reverse_balance,
    "reference_cotangent": _reference_cotangent,
    "reference_balance": _reference_balance,
    "gaussian_log_prob": _gaussian_log_prob,
    "guided_step": _guided_step,
    "group_norm_silu": _group_norm_silu,
}
VARIANTS = {
    "bf16": (torch.bfloat16, False),
    "bf16, outputs channels-last": (torch.bfloat16, True),
    "fp32": (torch.float32, False),
}


def compile_all(architecture: int, cases: Iterable[str] = CASES) -> Iterator[MachineCode]:
    """All kernels of the cases. A kernel that several cases launch in the same way occurs once."""
    run, compiled = triton.JITFunction.run, []

    def compile_only(kernel, *arguments, grid, warmup, **options):
        compiled.append(run(kernel, *arguments, grid=grid, warmup=True, **options))

    driver = object.__new__(CudaDriver)
    driver.get_current_device = lambda: architecture
    driver.get_current_stream = lambda device: 0
    driver.get_current_target = lambda: GPUTarget("cuda", architecture, 32)
    triton.runtime.driver.set_active(driver)
    triton.JITFunction.run = compile_only
    seen = set()
    try:
        for name in cases:
            for variant, (dtype, last) in VARIANTS.items():
                compiled.clear()
                CASES[name](dtype, last)
                for kernel in compiled:
                    if kernel.hash not in seen:
                        seen.add(kernel.hash)
                        yield _inspect(f"{name}, {variant}", kernel, architecture)
    finally:
        triton.JITFunction.run = run


def _inspect(case: str, kernel, architecture: int) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)[1]
        assemble = [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", ptx, "-o", os.devnull]
        report = subprocess.run(assemble, capture_output=True, text=True, check=True).stderr
        disassemble = [triton.knobs.nvidia.nvdisasm.path, "--no-dataflow", "--print-code", cubin]
        code = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    return MachineCode(
        case=case,
        kernel=kernel.metadata.name.strip("_").removesuffix("_kernel"),
        architecture=architecture,
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        shared=kernel.metadata.shared,
        spilled=int(re.search(r"(\d+) bytes spill stores", report)[1]),
        loads=_accesses(code, "LDG"),
        stores=_accesses(code, "STG"),
    )


def _accesses(code: str, instruction: str) -> tuple[tuple[int, int], ...]:
    widths = Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)+)", code):
        bits = re.search(r"\.(?:ENL2\.)?(?:U|S)?(8|16|64|128|256)\b", modifiers)
        widths[int(bits[1]) // 8 if bits else 4] += 1
    return tuple(sorted(widths.items(), reverse=True))


def table(codes: list[MachineCode]) -> str:
    """A Markdown table."""

    def widths(accesses: tuple[tuple[int, int], ...]) -> str:
        return ", ".join(f"{count} × {width}" for width, count in accesses) or "none"

    lines = [
        "# Machine code of the kernels",
        "",
        f"Compiled by Triton {triton.__version__} as launched at 16 × 4 × 64 × 64 with guidance; made by",
        "`python -m bench.machine_code --write`. Global loads and stores: instructions × bytes of a thread. Kernels that an",
        "earlier case also launches are omitted. bf16 and fp32: dtype of the networks' outputs; states are fp32. Of",
        "`group_norm_silu`: dtype of an activation of 1 × 128 × 64 × 64, in channels-last with 32 groups.",
        "",
        "| case | kernel | sm | registers | shared | spilled | loads | stores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.case} | {c.kernel} | {c.architecture} | {c.registers} | {c.shared} | {c.spilled} "
        f"| {widths(c.loads)} | {widths(c.stores)} |"
        for c in sorted(codes, key=lambda c: (c.case, c.kernel, c.architecture))
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET = 1: unset it, because the interpreter does not compile kernels")
    text = table([code for architecture in ARCHITECTURES for code in compile_all(architecture)])
    if "--write" in sys.argv[1:]:
        TABLE.write_text(text)
    print(text, end="")
