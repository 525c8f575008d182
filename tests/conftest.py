"""Test setup.

- Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors.
- xdist workers divide the CPU cores among them. Folders with long files are run first, so that no worker waits long at the end.
- Hypothesis draws the same examples in every run, unless started with `--hypothesis-profile random`; tests.fuzz_campaign uses its
  own profile.
"""

import contextlib
import os

import pytest

LONG = ("comparison", "config", "cost", "integration", "models", "study", "training")
"""Folders of tests that train, compile or plan large networks."""
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if PROCESSES > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // PROCESSES)))

import torch  # noqa: E402 - reads OMP_NUM_THREADS

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before kernels are imported

    from triton.runtime import interpreter

    def round_to_nearest(builder, source, target):
        """Round float32 to bfloat16 to nearest, ties to even, as GPUs do (PTX cvt.rn); Triton's interpreter truncates."""
        if source.dtype.scalar.is_fp32() and target.scalar.is_bf16():
            rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, target.scalar)
        return builder.cast_impl(source, target)

    interpreter.InterpreterBuilder.create_fp_trunc = round_to_nearest

with contextlib.suppress(ImportError):  # hypothesis may be missing on GPU machines, where few tests need it
    from hypothesis import HealthCheck, Phase, settings

    # No deadline and no check of the drawing speed: both depend on the load of the machine.
    random = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
    settings.register_profile("random", random)
    settings.register_profile("repeatable", random, derandomize=True)
    # Shrinking an example of a model takes minutes.
    settings.register_profile("campaign", random, phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)
    settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run `LONG` folders first. xdist keeps this order with --no-loadscope-reorder; by itself it would order files by their
    numbers of tests, and so start the long ones last."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)
