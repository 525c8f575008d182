"""Adds the machine's description to a GPU run, or exits if the machine has no GPU: `python -m bench.machine`."""

import datetime
import os
import shutil
import sys

import torch

from bench import rows
from bench.measure import device_info


def main() -> None:
    if not torch.cuda.is_available() and not rows.is_dry():
        sys.exit("torch sees no CUDA device. To exercise the code without one, run FASTNABLA_BENCH_DRY=1 bench/gpu.sh")
    now = datetime.datetime.now(datetime.UTC)
    tools = {tool: shutil.which(tool) or "not in PATH" for tool in ("nvcc", "compute-sanitizer")}
    cores = len(os.sched_getaffinity(0))
    rows.add("machine", "machine", date=f"{now:%Y-%m-%d %H:%M} UTC", **device_info(), cores=cores, **tools)


if __name__ == "__main__":
    main()
