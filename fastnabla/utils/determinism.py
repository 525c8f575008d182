"""Bitwise reproducible runs on a GPU: enables torch's deterministic algorithms."""

import logging
import os

import torch

logger = logging.getLogger(__name__)

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""The values for which cuBLAS sums in a fixed order; with any other value torch refuses matrix products."""


def make_deterministic() -> None:
    """Restrict this process to deterministic algorithms. A second call has no effect.

    An operation without a deterministic algorithm raises a RuntimeError that names it. For `scaled_dot_product_attention`
    torch uses the deterministic backward passes of flash and memory-efficient attention, and excludes cuDNN's kernel.
    torch.compile does not autotune between variants with different summation orders.

    Call this before CUDA is initialised, which is when cuBLAS reads its environment variable.

    Raises:
        ValueError: CUDA is already initialised without the variable, or the variable has an unsuitable value.
    """
    if WORKSPACE not in os.environ and torch.cuda.is_initialized():
        raise ValueError(
            f"deterministic = True: CUDA is already initialised; set {WORKSPACE}={WORKSPACES[0]} before starting Python."
        )
    value = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if value not in WORKSPACES:
        raise ValueError(
            f"deterministic = True: {WORKSPACE} = {value!r}: must be {' or '.join(WORKSPACES)}; change or unset it."
        )
    if not torch.are_deterministic_algorithms_enabled():
        logger.warning(
            "deterministic = True: slower on a GPU, mostly in the backward passes of attention and convolutions; "
            "an operation without a deterministic algorithm stops the run."
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
