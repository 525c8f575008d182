"""Test setup.

- Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors, and tests marked gpu are left out.
- xdist workers divide the CPU cores among them. Folders with long files are run first, so that no worker waits long at the end.
- Every test starts with the same random numbers.
- Hypothesis draws the same examples in every run, unless started with `--hypothesis-profile random`; tests.fuzz_campaign uses its
  own profile.
- Figures are saved blank, without being drawn, except in tests that use the fixture `drawn`.
- Garbage collection is off while tests are collected, and leaves out what is in memory then.
"""

import contextlib
import gc
import os
import random
import signal
from collections.abc import Callable, Generator, Iterator

import pytest

LONG = ("comparison", "config", "cost", "integration", "models", "study", "training")
"""Folders of tests that train, compile or plan large networks."""
SET_ONCE = (
    *("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"),
    *("TRITON_CACHE_DIR", "TRITON_LIBDEVICE_PATH", "TRITON_PTXAS_PATH"),
    *("MPLBACKEND", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"),
)
"""Variables that pytest, the first compiled network of a process, and the first command set."""
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if PROCESSES > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // PROCESSES)))

# These read OMP_NUM_THREADS.
import numpy  # noqa: E402
import torch  # noqa: E402

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
    drawn_anew = settings(
        deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    )
    settings.register_profile("random", drawn_anew)
    settings.register_profile("repeatable", drawn_anew, derandomize=True)
    # Shrinking an example of a model takes minutes.
    settings.register_profile(
        "campaign", drawn_anew, phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False
    )
    settings.load_profile("repeatable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need a GPU where there is none. Run `LONG` folders first: xdist keeps this order with
    --no-loadscope-reorder; by itself it would order files by their numbers of tests, and so start the long ones last."""
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    items.sort(key=lambda item: item.path.parent.name not in LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random weights and inputs do not depend on which tests ran before."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Garbage collection would scan the millions of objects of torch, diffusers and the tests each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute as a rank of `tests/ranks.py`, with one thread. Threads do not survive a fork, and two round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shared_state() -> dict[str, object]:
    """What a test could change for every later one of its process."""
    from fastnabla.config.presets import PRESETS

    return {
        "presets (use dataclasses.replace)": repr(PRESETS),
        "threads (use the fixture `one_thread`)": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "folder": os.getcwd(),
    } | {f"${name}": value for name, value in os.environ.items() if name not in SET_ONCE}


@pytest.fixture(autouse=True, scope="module")
def shared_state_is_left_alone() -> Iterator[None]:
    before = shared_state()
    yield
    after = shared_state()
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    assert not changed, f"a test of this file changed: {', '.join(changed)}"


@pytest.fixture(autouse=True, scope="session")
def savefig() -> Iterator[Callable[..., None] | None]:
    """Save figures as blank pictures, because drawing would take most of the time of short runs. Returns the original."""
    try:
        from matplotlib.figure import Figure
        from PIL import Image
    except ImportError:  # on GPU machines, where nothing is drawn
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        original = Figure.savefig
        patch.setattr(Figure, "savefig", lambda figure, file, **options: Image.new("L", (1, 1)).save(file, "png"))
        yield original


@pytest.fixture
def drawn(savefig: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures as outside the tests."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
