"""The optimizer: step sizes, groups, clipping; each algorithm against its formula in float64; its state."""

import io
import sys
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fastnabla.config.model_sections import FlowConfig
from fastnabla.config.training_sections import OptimizerConfig
from fastnabla.optim.optimizer import (
    BLOCK,
    MIN_8BIT_SIZE,
    Optimizer,
    expected_state_bytes,
    page_states,
    step_size_factor,
)

ON_CPU = ("adamw", "adamw8bit", "lion8bit")
EIGHT_BIT = ("adamw8bit", "lion8bit")
SETTINGS = {"learning_rate": 0.02, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.5, "max_grad_norm": 1e9}
SMALL, LARGE = (63, 65), (96, 70)  # 4095 elements, which stay in float32, and 6720: 26 blocks and a part of one
NAMES_ON = [pytest.param(name, "cpu", id=f"{name}-cpu") for name in ON_CPU] + [
    pytest.param(name, "cuda", marks=pytest.mark.gpu, id=f"{name}-cuda") for name in (*ON_CPU, "paged_adamw8bit")
]


class Stub(nn.Module):
    """What the optimizer sees of a policy."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def trainable(self) -> list[nn.Parameter]:
        return list(self.weights)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(shape: tuple[int, ...], update: int) -> Tensor:
    """Of magnitude 0.2 to 1 with random signs: a block's elements are then on the fine part of the 8-bit table."""
    noise = normal(*shape, seed=100 + update)
    return noise.sign() * (0.2 + 0.8 * noise.abs().clamp(max=1))


def build(name: str, *weights: Tensor, updates: int = 10, **changes) -> tuple[Stub, Optimizer]:
    policy = Stub(*weights)
    return policy, Optimizer(policy, None, OptimizerConfig(name=name, **(SETTINGS | changes)), FlowConfig(), updates)


def train(policy: Stub, optimizer: Optimizer, first: int, last: int) -> None:
    """Updates number `first` to `last` - 1, with gradients that are a function of that number."""
    for update in range(first, last):
        for weight in policy.weights:
            weight.grad = torch.empty_like(weight).copy_(gradient(weight.shape, update))  # strides as autograd's
        optimizer.update()


def adamw(weight: Tensor, grads: list[Tensor], rates: list[float], decay: float) -> Tensor:
    """Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2, in float64, with the betas of `SETTINGS`."""
    weight, m, v = weight.double(), 0.0, 0.0
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        m = 0.9 * m + 0.1 * grad.double()
        v = 0.95 * v + 0.05 * grad.double() ** 2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        weight = weight - rate * (step + decay * weight)
    return weight


def lion(weight: Tensor, grads: list[Tensor], rates: list[float], decay: float) -> Tensor:
    """Chen et al., arXiv 2302.06675, Algorithm 2, in float64, with the betas of `SETTINGS`."""
    weight, m = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for grad, rate in zip(grads, rates, strict=True):
        weight = weight - rate * ((0.9 * m + 0.1 * grad).sign() + decay * weight)
        m = 0.95 * m + 0.05 * grad.double()
    return weight


FORMULA: dict[str, Callable[..., Tensor]] = {"adamw": adamw, "adamw8bit": adamw, "lion8bit": lion}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_step_sizes_rise_then_stay_or_fall_and_are_never_zero(schedule: str, warmup: int) -> None:
    factors = [step_size_factor(update, 20, schedule, warmup) for update in range(20)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[0] == 1 / (warmup + 1)
    assert factors[-1] == 1 if schedule == "constant" else factors[-1] < 0.1


@pytest.mark.parametrize("name", ON_CPU)
def test_each_group_has_its_own_norm_bound_and_step_size(name: str) -> None:
    policy, flow = Stub(torch.zeros(4)), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(flow.weight)
    optimizer = Optimizer(
        policy,
        flow,
        OptimizerConfig(name=name, learning_rate=0.1, max_grad_norm=1.0, weight_decay=0.0, warmup=1),
        FlowConfig(learning_rate=0.01, weight_decay=0.0),
        10,
    )
    (weight,) = policy.weights
    weight.grad = torch.tensor([30.0, 40.0, 0.0, 0.0])
    flow.weight.grad = torch.tensor([[0.5]])
    norms = optimizer.update()
    assert norms["grad_norm_lora"].item() == pytest.approx(50)
    assert norms["grad_norm_flow"].item() == pytest.approx(0.5)
    # The first update is the step size times the sign, AdamW's and Lion's alike; the warm-up halves it.
    torch.testing.assert_close(weight.data, torch.tensor([-0.05, -0.05, 0.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(flow.weight.data, torch.tensor([[-0.005]]), atol=1e-6, rtol=0)
    assert weight.grad is None and flow.weight.grad is None


def test_gradients_are_scaled_down_to_the_bound_and_never_up() -> None:
    policy, optimizer = build("adamw", torch.zeros(2), max_grad_norm=1.0)
    (weight,) = policy.weights
    for grad, clipped in (([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
        weight.grad = torch.tensor(grad)
        optimizer._clip([weight])
        torch.testing.assert_close(weight.grad, torch.tensor(clipped))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_clipping_reads_nothing_on_the_host(device: str) -> None:
    """Fake tensors have no values: any read of one, such as a check for NaN, raises."""
    _, optimizer = build("adamw", torch.zeros(2))
    with FakeTensorMode():
        weight = nn.Parameter(torch.zeros(4, device=device))
        weight.grad = torch.ones(4, device=device)
        norm = optimizer._clip([weight])
        assert norm.shape == () and norm.device == weight.device
        with pytest.raises(RuntimeError):
            norm.item()


def test_adamw_is_the_fused_one() -> None:
    _, optimizer = build("adamw", torch.zeros(2))
    assert all(group["fused"] for group in optimizer.algorithm.param_groups)


@pytest.mark.parametrize("name", ON_CPU)
def test_float32_state_follows_the_formula_to_rounding(name: str) -> None:
    shapes = (SMALL, LARGE) if name == "adamw" else (SMALL,)
    starts = [normal(*shape) for shape in shapes]
    policy, optimizer = build(name, *[start.clone() for start in starts], schedule="linear", warmup=2)
    train(policy, optimizer, 0, 5)
    rates = [0.02 * step_size_factor(update, 10, "linear", 2) for update in range(5)]
    for start, weight in zip(starts, policy.weights, strict=True):
        expected = FORMULA[name](start, [gradient(weight.shape, update) for update in range(5)], rates, 0.5)
        # Five updates of at most 0.02 leave a weight within a few roundings, 2⁻²⁴ of its size each.
        torch.testing.assert_close(weight.data.double(), expected, atol=1e-8, rtol=10 * 2**-24)


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_first_update_of_8_bit_state_follows_the_formula_to_rounding(name: str) -> None:
    """It is computed from the new moments before they are rounded."""
    start = normal(*LARGE)
    policy, optimizer = build(name, start.clone())
    train(policy, optimizer, 0, 1)
    expected = FORMULA[name](start, [gradient(LARGE, 0)], [0.02], 0.5)
    torch.testing.assert_close(policy.weights[0].data.double(), expected, atol=1e-8, rtol=4 * 2**-24)


def test_8_bit_adamw_stays_within_its_rounding_of_the_formula() -> None:
    """The table's step is 1.4% of a block's largest for m and 0.7% for v, and rounding is off by up to half of it. In
    units of the updates' spread that comes to 0.5%, and 2.4% at worst; twice as much is let pass."""
    start = normal(*LARGE)
    policy, optimizer = build("adamw8bit", start.clone(), weight_decay=0.0)
    train(policy, optimizer, 0, 5)
    expected = adamw(start, [gradient(LARGE, update) for update in range(5)], [0.02] * 5, 0.0)
    error = (policy.weights[0].data.double() - expected) / (expected - start.double()).std()
    assert 1e-4 < error.std() < 0.01  # and it is rounded at all
    assert error.abs().max() < 0.05


def test_8_bit_lion_takes_the_formulas_steps_where_the_sign_is_not_a_tie() -> None:
    start, grads = normal(*LARGE), [gradient(LARGE, update) for update in range(2)]
    policy, optimizer = build("lion8bit", start.clone())
    train(policy, optimizer, 0, 2)
    expected = lion(start, grads, [0.02] * 2, 0.5)
    second = 0.9 * 0.05 * grads[0] + 0.1 * grads[1]
    clear = second.abs() > 0.9 * 0.05 * 0.0141 / 2  # what rounding the first moment, 0.05 at most, can turn
    assert clear.float().mean() > 0.99
    torch.testing.assert_close(policy.weights[0].data.double()[clear], expected[clear], atol=1e-7, rtol=10 * 2**-24)


@pytest.mark.parametrize("name", ON_CPU)
def test_weight_decay_is_decoupled_from_the_gradient(name: str) -> None:
    """Without a gradient weights shrink by the same share, whatever their size; coupled, they would move by a step."""
    starts = [normal(*shape) for shape in (SMALL, LARGE)]
    policy, optimizer = build(name, *[start.clone() for start in starts])
    for weight in policy.weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.update()
    for start, weight in zip(starts, policy.weights, strict=True):
        torch.testing.assert_close(weight.data, start * (1 - 0.02 * 0.5))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the state's tensors on all devices, counting each storage once."""
    tensors = (value for state in optimizer.algorithm.state.values() for value in state.values())
    storages = (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(("name", "device"), NAMES_ON)
def test_state_bytes_are_what_is_expected(name: str, device: str) -> None:
    sizes = (1, MIN_8BIT_SIZE - 1, MIN_8BIT_SIZE, MIN_8BIT_SIZE + 1, 20 * BLOCK, 200_000)
    for some in (sizes, sizes[:2]):
        policy, optimizer = build(name, *[torch.zeros(size, device=device) for size in some])
        assert state_bytes(optimizer) == 0
        train(policy, optimizer, 0, 1)
        assert state_bytes(optimizer) == expected_state_bytes(name, some)


def test_expected_bytes_a_parameter() -> None:
    sizes = [1 << 20] * 100
    a_parameter = {name: expected_state_bytes(name, sizes) / sum(sizes) for name in (*ON_CPU, "paged_adamw8bit")}
    expected = {"adamw": 8, "adamw8bit": 2 + 8 / 256, "paged_adamw8bit": 2 + 8 / 256, "lion8bit": 1 + 4 / 256}
    assert a_parameter == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ON_CPU)
def test_an_update_that_is_not_accepted_moves_the_schedule_alone(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """Not even the first one, which has no moments yet."""
    policy, optimizer = build(name, normal(*LARGE), schedule="linear")
    expected = normal(*LARGE)
    for update in range(4):
        policy.weights[0].grad = torch.full(LARGE, float("nan")) if update != 1 else gradient(LARGE, 0)
        moments = {n: v.clone() for n, v in optimizer.algorithm.state[policy.weights[0]].items() if torch.is_tensor(v)}
        norms = optimizer.update(lambda norms: bool(norms["grad_norm_lora"].isfinite()))
        assert bool(norms["grad_norm_lora"].isfinite()) == (update == 1)
        assert policy.weights[0].grad is None
        if update == 1:
            assert not torch.equal(policy.weights[0], expected)
            expected = policy.weights[0].detach().clone()
        else:
            assert torch.equal(policy.weights[0], expected)
            state = optimizer.algorithm.state[policy.weights[0]]
            assert all(torch.equal(state[name], value) for name, value in moments.items())
        assert optimizer.schedule.get_last_lr() == [pytest.approx(0.02 * (1 - (update + 1) / 10))]
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


@pytest.mark.parametrize(("name", "device"), NAMES_ON)
def test_resumed_is_uninterrupted_bit_for_bit(name: str, device: str) -> None:
    starts = [normal(*shape).to(device) for shape in (SMALL, LARGE, (400, 300))]
    schedule = {"schedule": "cosine", "warmup": 2, "updates": 6}
    policy, optimizer = build(name, *[start.clone() for start in starts], **schedule)
    train(policy, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save([optimizer.algorithm.state_dict(), optimizer.schedule.state_dict()], file)
    resumed_policy, resumed = build(name, *[weight.data.clone() for weight in policy.weights], **schedule)
    file.seek(0)
    resumed.load_state_dict(*torch.load(file, weights_only=True, map_location=device))
    assert state_bytes(resumed) == state_bytes(optimizer)
    train(policy, optimizer, 3, 6)
    train(resumed_policy, resumed, 3, 6)
    for weight, again in zip(policy.weights, resumed_policy.weights, strict=True):
        assert torch.equal(weight, again)
        moment, loaded = (o.algorithm.state[p].get("state1") for o, p in ((optimizer, weight), (resumed, again)))
        assert hasattr(moment, "is_paged") == hasattr(loaded, "is_paged")


def test_loaded_moments_are_moved_into_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(normal(*LARGE))
    algorithm = bitsandbytes.optim.AdamW8bit([weight])
    weight.grad = gradient(LARGE, 0)
    algorithm.step()
    before = {moment: algorithm.state[weight][moment].clone() for moment in ("state1", "state2")}
    pages = []

    def allocate(parameter: Tensor, dtype: torch.dtype) -> Tensor:
        pages.append(torch.zeros_like(parameter, dtype=dtype))
        return pages[-1]

    monkeypatch.setattr(algorithm, "get_state_buffer", allocate)
    page_states(algorithm)
    for page, (moment, value) in zip(pages, before.items(), strict=True):
        assert algorithm.state[weight][moment] is page
        assert torch.equal(page, value) and value.any()


@pytest.mark.parametrize("name", ON_CPU)
def test_weights_in_channels_last_stay_so_in_place_and_learn_the_same(name: str) -> None:
    start = normal(32, 24, 3, 3)
    policies = []
    for format in (torch.contiguous_format, torch.channels_last):
        policy, optimizer = build(name, start.clone(memory_format=format))
        address = policy.weights[0].data_ptr()
        train(policy, optimizer, 0, 3)
        assert policy.weights[0].is_contiguous(memory_format=format)
        assert policy.weights[0].data_ptr() == address
        policies.append(policy)
    torch.testing.assert_close(policies[0].weights[0], policies[1].weights[0], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("adamw", torch.complex64, "'adamw': takes .* one parameter is complex64 on cpu"),
        ("adamw", torch.float8_e5m2, "'adamw': takes .* one parameter is float8_e5m2 on cpu"),
        ("lion8bit", torch.float64, "'lion8bit': takes .* one parameter is float64 on cpu"),
        ("paged_adamw8bit", torch.float32, "'paged_adamw8bit': .* on the CPU; use 'adamw8bit'"),
    ],
)
def test_parameters_that_an_algorithm_does_not_take(name: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=r"^optimizer\.name = " + message):
        build(name, torch.zeros(4).to(dtype))


def test_bitsandbytes_that_is_missing_or_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        on_gpu = torch.zeros(4, device="cuda")
    monkeypatch.setattr(bitsandbytes.cextension.lib, "compiled_with_cuda", False)
    with pytest.raises(ValueError, match=r"^optimizer\.name = 'adamw8bit': bitsandbytes has no library for"):
        build("adamw8bit", on_gpu)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"^optimizer\.name = 'lion8bit': .* pip install bitsandbytes"):
        build("lion8bit", torch.zeros(4))
    build("adamw", torch.zeros(4))
