"""Without a GPU, Triton's kernels run in its interpreter, on CPU tensors. Test processes share the cores. Hypothesis draws
the same examples in each run, or others with `--hypothesis-profile random`."""

import contextlib
import os

PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if PROCESSES > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // PROCESSES)))

import torch  # noqa: E402 - reads the number of threads

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, so before any import of them

    from triton.runtime import interpreter

    def round_to_nearest(builder, source, target):
        """GPUs round float32 to bfloat16 to the nearest, ties to even (PTX cvt.rn); Triton's interpreter cuts off."""
        if source.dtype.scalar.is_fp32() and target.scalar.is_bf16():
            rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, target.scalar)
        return builder.cast_impl(source, target)

    interpreter.InterpreterBuilder.create_fp_trunc = round_to_nearest

with contextlib.suppress(ImportError):  # GPU machines may lack it; most of their tests do without
    from hypothesis import HealthCheck, settings

    # Neither deadline nor speed of drawing is checked: both depend on what else the machine does.
    random = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
    settings.register_profile("random", random)
    settings.register_profile("repeatable", random, derandomize=True)
    settings.load_profile("repeatable")
