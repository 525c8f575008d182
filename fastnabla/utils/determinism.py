"""Runs that are equal bit for bit on a GPU too: torch's switches for deterministic algorithms."""

import logging
import os

import torch

logger = logging.getLogger(__name__)

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""Its values with which cuBLAS adds up in the same order whatever else runs; torch refuses to multiply with others."""


def make_deterministic() -> None:
    """Let this process use deterministic algorithms alone, until it ends. A second call changes nothing.

    An operation without one raises a RuntimeError that names it. Of the kernels of `scaled_dot_product_attention`, flash and
    memory-efficient attention have a deterministic backward pass, which torch then takes, and cuDNN's is left out.
    torch.compile measures no variants whose sums differ.

    Call it before CUDA starts: cuBLAS reads its variable then.

    Raises:
        ValueError: CUDA has started without the variable, or it has another value.
    """
    if WORKSPACE not in os.environ and torch.cuda.is_initialized():
        raise ValueError(f"deterministic = True: CUDA has started already; set {WORKSPACE}={WORKSPACES[0]} before.")
    value = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if value not in WORKSPACES:
        raise ValueError(f"deterministic = True: {WORKSPACE} is {value!r}; unset it, or set {' or '.join(WORKSPACES)}.")
    if not torch.are_deterministic_algorithms_enabled():
        logger.warning(
            "deterministic = True: slower on a GPU, in the backward passes of attention and convolutions above all; "
            "operations without a deterministic algorithm stop the run."
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
