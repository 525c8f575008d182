"""How kernels are launched: as torch operations, on checked arguments, where they can run."""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastnabla
from bench.published import ddim_table
from fastnabla.kernels.by_row import scale_gradients
from fastnabla.kernels.forward_balance import forward_balance, forward_balance_op
from fastnabla.kernels.gaussian_log_prob import gaussian_log_prob_backward_op, gaussian_log_prob_op
from fastnabla.kernels.group_norm_silu import group_norm_silu_backward_op, group_norm_silu_op
from fastnabla.kernels.guided_step import guided_step_op
from fastnabla.kernels.launching import TILE, check_steps, layout
from fastnabla.kernels.reference_balance import reference_balance_op
from fastnabla.kernels.reference_cotangent import reference_cotangent_op
from fastnabla.kernels.reverse_balance import reverse_balance_op
from fastnabla.kernels.reverse_cotangent import reverse_cotangent_op
from fastnabla.objective.backend import _say, select
from fastnabla.objective.fused import FUSED
from fastnabla.objective.ops import PLAIN
from tests.checks import randn
from tests.kernel_cases import in_channels_last, on_each_device

BF16, FP32 = torch.bfloat16, torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = (3, 2, 3, 5)
x, x_next, single, score = (randn(*SHAPE, seed=seed) for seed in range(4))
pair = in_channels_last(randn(6, 2, 3, 5, seed=4, dtype=BF16))
flow = in_channels_last(randn(*SHAPE, seed=5, dtype=BF16))
upstream = torch.ones(3)
steps, table = torch.tensor([1, 4, 9]), ddim_table(10).packed(CPU)

STATES, REFERENCE = (x, x_next, table, steps), (x, table, steps)
CHANNELS = torch.ones(2)
GROUPS = (flow, torch.zeros(3, 2), torch.ones(3, 2), CHANNELS, CHANNELS, 2)
GUIDED, BARE = (5.0, 1.0, "alpha_bar", 0.5), (None, 1.0, "constant", 1.0)
CALLS = {
    "forward_balance": (forward_balance_op, (pair, pair, *STATES, score, flow, x, *GUIDED, True, 1.0, True)),
    "forward_balance_bare": (forward_balance_op, (x, x, *STATES, score, None, None, *BARE, False, 0.0, False)),
    "forward_balance_no_flow": (forward_balance_op, (x, x, *STATES, score, None, x, *BARE, False, 1.0, True)),
    "reverse_balance": (reverse_balance_op, (*STATES, flow, score, pair, pair, *GUIDED, True, True, True)),
    "reverse_balance_bare": (reverse_balance_op, (*STATES, flow, score, None, None, *BARE, False, False, False)),
    "reverse_cotangent": (reverse_cotangent_op, (pair, *STATES, score, *GUIDED)),
    "reverse_cotangent_bare": (reverse_cotangent_op, (single, *STATES, None, *BARE)),
    "reference_balance": (reference_balance_op, (*REFERENCE, flow, score, flow, x, 1.0, "alpha_bar", True, True, True)),
    "reference_balance_bare": (
        reference_balance_op,
        (*REFERENCE, flow, score, None, x, 1.0, "constant", False, False, False),
    ),
    "reference_cotangent": (reference_cotangent_op, (pair, table, steps, score, flow, x, 5.0, 1.0, "alpha_bar")),
    "reference_cotangent_bare": (
        reference_cotangent_op,
        (single, table, steps, score, None, None, None, 1.0, "constant"),
    ),
    "log_prob": (gaussian_log_prob_op, (pair, flow, x_next, table, steps, 5.0, True)),
    "log_prob_bare": (gaussian_log_prob_op, (single, *STATES, None, False)),
    "log_prob_backward": (gaussian_log_prob_backward_op, (upstream, x, pair, *STATES, 5.0, [True] * 3)),
    "log_prob_backward_x": (gaussian_log_prob_backward_op, (upstream, x, x, *STATES, None, [False, True, False])),
    "guided_step": (guided_step_op, (pair, flow, x, table, steps, 5.0)),
    "guided_step_bare": (guided_step_op, (x, x, x_next, table, steps, None)),
    "group_norm_silu": (group_norm_silu_op, (flow, CHANNELS, CHANNELS, 2, 1e-6)),
    "group_norm_silu_backward": (
        group_norm_silu_backward_op,
        (in_channels_last(x), *GROUPS, flow, in_channels_last(x_next)),
    ),
    "group_norm_silu_backward_bare": (
        group_norm_silu_backward_op,
        (in_channels_last(x), *GROUPS, None, in_channels_last(x_next)),
    ),
    "scale_gradients": (scale_gradients, (upstream, x, in_channels_last(score), BF16, FP32, 5.0)),
    "scale_output": (scale_gradients, (upstream, in_channels_last(x), None, BF16, FP32, None)),
    "scale_flow": (scale_gradients, (upstream, None, x, BF16, BF16, 5.0)),
}


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize(("operation", "arguments"), CALLS.values(), ids=CALLS)
def test_operations(operation, arguments, device):
    """They write to what their schemas say, and their fakes say what they return."""
    torch.library.opcheck(operation, [a.to(device) if isinstance(a, Tensor) else a for a in arguments])


@pytest.mark.slow
@on_each_device
def test_compiled_code_has_the_same_gradients(device):
    def loss(output: Tensor, flow: Tensor) -> Tensor:
        states = (tensor.to(device) for tensor in (pair, *STATES, score))
        weights = {"guidance_scale": 5.0, "beta": 1.0, "gamma": "alpha_bar", "prior_weight": 0.5}
        value, statistics = forward_balance(output, *states, flow, by_sigma=True, trust_region_weight=0.0, **weights)
        return (2 * value).sin().sum() + statistics.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [tensor.to(device).requires_grad_() for tensor in (pair.clone(), flow.clone())]
        value = function(*inputs)
        results.append((value, *torch.autograd.grad(value, inputs)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("last", "channels"), [((), 1), (("x", "x_next"), 1), (("x",), 2), (("x_next",), 2)], ids=str)
def test_rows_are_runs_of_memory_where_tensors_agree(last, channels):
    tensors = {"x": x, "x_next": x_next} | {name: in_channels_last(x) for name in last}
    made = layout(x, **tensors, flow=None)
    assert made.constants["C"] == channels
    assert made.positions * channels == 2 * 3 * 5


TRANSPOSED = randn(3, 2, 5, 3).transpose(2, 3)
WRONG_TENSORS = {
    "device": ({"x_next": x.to("meta")}, "x_next is on meta, expected cpu"),
    "shape": ({"x_next": x[:, :1]}, r"x_next has shape \(3, 1, 3, 5\), expected \(3, 2, 3, 5\)"),
    "rows": ({"x_next": x[:2]}, r"x_next has shape \(2, 2, 3, 5\), expected \(3, 2, 3, 5\)"),
    "pair": ({"output": x}, r"output has shape \(3, 2, 3, 5\), expected \(6, 2, 3, 5\)"),
    "float64": (
        {"x": x.double()},
        "x has dtype torch.float64, expected one of torch.float32, torch.bfloat16, torch.fl",
    ),
    "integers": ({"x_next": x.long()}, "x_next has dtype torch.int64, expected one of torch.float32"),
    "transposed": ({"x_next": TRANSPOSED}, r"x_next .* strides \(30, 15, 1, 3\): expected contiguous or channels-last"),
    "expanded": ({"x_next": x[:1].expand(SHAPE)}, r"x_next .* strides \(0, 15, 5, 1\): .* pass x_next.contiguous\(\)"),
    "every_other": ({"output": randn(12, 2, 3, 5)[::2]}, r"output .* strides \(60, 15, 5, 1\): expected contiguous or"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_tensors(changes, message):
    with pytest.raises(ValueError, match=message):
        layout(x, pairs=("output",), **{"output": pair, "x": x, "x_next": x_next, **changes})


def test_flat_rows_are_contiguous():
    flat = randn(5, 3).t()
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\) and strides \(1, 3\): expected contiguous"):
        layout(flat, x=flat)


def test_shortest_and_longest_row():
    """A kernel counts a row's elements, up to the end of its last tile, in int32."""
    longest = torch.empty(1, 2**31 - TILE - 1, device="meta")
    assert layout(longest, x=longest).tiles == 2**31 // TILE - 1
    longer = torch.empty(1, 2**31 - TILE, device="meta")
    for wrong in (longer, torch.empty(3, 0, 5), torch.empty(3), torch.empty(())):
        with pytest.raises(
            ValueError, match=rf"^score has shape .*: expected \[N, …\] with 1 to 2³¹ − {TILE + 1} elements a row"
        ):
            layout(wrong, flow=None, score=wrong)


WRONG_STEPS = {
    "table_device": ({"table": table.to("meta")}, r"table is .* on meta .*, expected contiguous .* on cpu"),
    "table_width": ({"table": table[:, :7].clone()}, r"table is torch.float32 \(10, 7\) .*, expected .* \(steps, 8\)"),
    "table_dtype": ({"table": table.double()}, r"table is torch.float64 .*, expected contiguous torch.float32"),
    "table_strides": ({"table": torch.zeros(8, 10).t()}, r"table is .* with strides \(1, 10\), expected contiguous"),
    "device": ({"step_index": steps.to("meta")}, r"step_index is .* on meta, expected torch.int64 \(3,\) on cpu"),
    "shape": ({"step_index": steps[:2]}, r"step_index is torch.int64 \(2,\) on cpu, expected torch.int64 \(3,\)"),
    "dtype": ({"step_index": steps.int()}, r"step_index is torch.int32 \(3,\) on cpu, expected torch.int64 \(3,\)"),
    "strides": (
        {"step_index": steps.repeat(2)[::2]},
        r"step_index has strides \(2,\), expected contiguous; pass step_",
    ),
    "too_large": ({"step_index": steps + 1}, r"step_index is \[2, 5, 10\], expected steps in 0\.\.9"),
    "negative": ({"step_index": steps - 2}, r"step_index is \[-1, 2, 7\], expected steps in 0\.\.9"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_wrong_steps(changes, message):
    with pytest.raises(ValueError, match=message):
        check_steps(**{"table": table, "step_index": steps, "x": x, **changes})


def test_first_and_last_step():
    check_steps(table, torch.tensor([0, 9, 0]), x)


@pytest.mark.gpu
def test_rows_of_unknown_steps_are_nan_on_a_gpu():
    """Whose steps nobody looks at, for that would wait for the device."""
    unknown = torch.tensor([10, 4, -1], device=CUDA)
    log_prob, _ = gaussian_log_prob_op(*(t.to(CUDA) for t in (single, x, x_next, table)), unknown, None, False)
    assert log_prob.isnan().tolist() == [True, False, True]


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_auto_takes_kernels_on_cuda(monkeypatch):
    """Also where CPU tensors could be interpreted, which is slow."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select("auto", CUDA) is FUSED
    assert select("auto", CUDA, BF16) is FUSED
    assert select("auto", CUDA, torch.float64) is PLAIN
    assert select("auto", CPU) is PLAIN


def test_torch_takes_plain_torch():
    assert select("torch", CUDA) is PLAIN


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select("triton", CPU) is FUSED
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        ValueError, match=r"backend = 'triton': the kernels need CUDA tensors, the tensors are on cpu\. Use"
    ):
        select("triton", CPU)


def test_triton_does_not_compute_in_float64():
    with pytest.raises(ValueError, match="backend = 'triton': the kernels compute in float32, the tensors are float64"):
        select("triton", CUDA, torch.float64)


def test_triton_missing(without_triton):
    assert select("auto", CUDA) is PLAIN
    with pytest.raises(ValueError, match="backend = 'triton': Triton is not installed"):
        select("triton", CUDA)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend = 'cuda': expected one of \('auto', 'triton', 'torch'\)"):
        select("cuda", CUDA)


def test_choice_is_logged_once(caplog):
    _say.cache_clear()
    with caplog.at_level(logging.INFO, "fastnabla"):
        for _ in range(2):
            select("auto", CUDA), select("torch", CPU), select("auto", CPU)
    assert caplog.messages == [
        "objective: Triton kernels",
        "objective: plain torch, as asked",
        "objective: plain torch, the kernels need CUDA tensors, the tensors are on cpu",
    ]


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if not installed: `import triton` fails, and no spec is found

import dataclasses, torch
from fastnabla.losses import residual_db_loss
from fastnabla.transition import TransitionTable

columns = {field.name: torch.full((2,), 0.5) for field in dataclasses.fields(TransitionTable)}
table = TransitionTable(**{**columns, "timestep": torch.tensor([1.0, 0]), "timestep_next": torch.zeros(2)})
output, x = torch.ones(4, 3, requires_grad=True), torch.ones(2, 3)
result = residual_db_loss(output, 0 * x.repeat(2, 1), x, x, table.timestep, table, x, guidance_scale=5.0, beta=1.0)
result.loss.backward()
print(result.loss.item(), output.grad.abs().sum().item() > 0)
"""


@pytest.mark.slow
def test_losses_without_triton():
    """The residual is ``(b/σ²) o − βγ∇r = 2 − 1/2``."""
    root = Path(fastnabla.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["2.25", "True"], done.stderr
