"""torch.compile of what is differentiated twice: the same gradients, and nothing compiled anew."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from fastnabla.distributed.beacon import BEACON
from fastnabla.models import compiling
from fastnabla.models.conditions import Conditions
from fastnabla.models.policy import Policy
from fastnabla.trajectories.transitions import Transitions
from tests.checks import assert_gradients, compiler_settings, randn
from tests.golden import GoldenStep
from tests.methods.test_sharing import batch, gradients, joined, run_of
from tests.small_step import small_step


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before, and nothing left."""
    torch._dynamo.reset()
    counters.clear()
    with compiler_settings():
        yield
    torch._dynamo.reset()
    counters.clear()


TINY = {
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
"""A UNet with attention, and so a LoRA, in the middle alone: quick to trace."""


def different_cut(golden: GoldenStep) -> Transitions:
    """As many transitions as in `batch`, of other trajectories and other runs: of 6 inner ones 2 + 2 + 2 are adjacent."""
    last = len(golden.table) - 1
    runs = [run_of(golden, trajectory, [2 * trajectory, 2 * trajectory + 1]) for trajectory in (1, 2, 0)]
    return joined(*(run_of(golden, trajectory, [last]) for trajectory in range(3)), *runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward_gradient", "reuse_passes"),
    [("lookahead", True), ("terminal", False)],
)
def test_no_micro_batch_compiles_anew(
    reward_gradient: str, reuse_passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step compiles all that there is; other numbers of rows are padded to its own, and give the same gradients.

    By torch's tracing alone, which decides about graphs; no code is generated.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    golden = small_step()
    step = golden.step(100, reward_gradient=reward_gradient, reuse_passes=reuse_passes)
    transitions = batch(golden)
    parts = ((transitions, 100), (transitions[:8], 100), (transitions, 4), (different_cut(golden), 2), (transitions, 1))
    expected = []
    for part, step.micro_batch in parts:
        expected.append(gradients(golden, step, part))
    golden.policy.optimise(compile="whole")
    graphs = 0
    for (part, step.micro_batch), wanted in zip(parts, expected, strict=True):
        assert_gradients(gradients(golden, step, part), wanted)
        graphs = graphs or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs
    assert graphs == 1 + reuse_passes  # one for each number of rows
    cost = compiling.compile_cost()
    assert cost.graphs == graphs and cost.seconds > 0


@pytest.mark.slow
def test_padded_rows_are_counted_and_running_out_of_memory_ends_them() -> None:
    golden = small_step()
    golden.policy.compile = "whole"  # as far as the step knows
    step = golden.step(100, reward_gradient="terminal")
    report = step(batch(golden))
    assert golden.policy.static_rows == (6,)
    assert report.passes == {"inner": 5, "last": 2 * 3}  # three rows are padded to six
    attempts = []

    def fails_once(*arguments):
        attempts.append(arguments)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError
        return compute(*arguments)

    compute, step.gradients = step.gradients, fails_once
    step(batch(golden))
    assert step.micro_batch == 3 and golden.policy.static_rows == (3,)


@pytest.mark.slow
def test_next_states_have_a_size_of_their_own_where_passes_are_shared() -> None:
    """Whatever number of last transitions there is, which have no pass at x'."""
    golden = small_step()
    golden.policy.compile = "whole"  # as far as the step knows
    runs = [run_of(golden, trajectory, [0, 1, 2, 3]) for trajectory in range(2)]
    last = [run_of(golden, trajectory, [len(golden.table) - 1]) for trajectory in range(8)]
    report = golden.step(8, reuse_passes=True)(joined(*runs, *last))
    assert golden.policy.static_rows == (2, 8)
    assert report.passes == {"inner": (6 * 8 + 2 * 2) / 8, "last": 3}


@pytest.mark.slow
def test_every_shape_of_a_block_has_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one class share a limit, which is above torch's own, 8; the next graph is an error. Stable Diffusion 1.5 has 75."""
    assert compiling.MAX_GRAPHS > 75
    monkeypatch.setattr(compiling, "MAX_GRAPHS", 10)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    network = nn.ModuleList(Block() for _ in range(11))
    compiling.compile_blocks(network, (Block,))
    for width, block in enumerate(network[:10], 1):
        block(torch.ones(2, width))
    assert counters["stats"]["unique_graphs"] == 10
    with pytest.raises(FailOnRecompileLimitHit):
        network[10](torch.ones(2, 11))


def test_compiled_and_not_again() -> None:
    policy = Policy(UNet2DConditionModel(**TINY, cross_attention_dim=16), Conditions(randn(3, 7, 16)), 5.0, rank=2)
    x, timestep, prompt = randn(2, 4, 8, 8), torch.full((2,), 501), torch.tensor([0, 1])
    policy.lora.one_graph = True  # as compiled
    before = policy(x, timestep, prompt)
    policy.lora.one_graph = False
    for parameter in policy.trainable():
        parameter.data.add_(0.1)
    after = policy(x, timestep, prompt)
    assert not torch.equal(before, after)
    assert all(gradient.any() for gradient in torch.autograd.grad(after.sum(), policy.weights()))


@pytest.mark.slow
def test_graph_is_differentiated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    network = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
    x = randn(128, 64).requires_grad_()

    def twice(function) -> tuple[torch.Tensor, ...]:
        output = function(x)
        (first,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        return first, *torch.autograd.grad(output.square().sum(), list(network.parameters()))

    expected = twice(network)
    for actual, tensor in zip(twice(compiling.compiled(network.forward)), expected, strict=True):
        torch.testing.assert_close(actual, tensor, rtol=1e-4, atol=1e-4)
    assert not torch._functorch.config.donated_buffer


def test_compiling_is_excused_from_the_limit_on_hangs() -> None:
    progress = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        progress.append(BEACON.progress)
        return graph

    for _ in range(2):
        compiling.allow_compiling()
    torch.compile(lambda x: x + 1, backend=backend)(randn(2))
    assert progress == [None] and BEACON.progress is not None


@pytest.mark.slow
def test_what_should_cancel_does_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new LoRA changes nothing, and the policy that samples is the one that is trained: compiled too, in half precision,
    whatever the number of rows. Two graphs of one network would round differently: on a CPU by 4e-3 of the output's mean
    square in bfloat16.

    By torch's tracing, which decides about graphs: the first pass makes all that there are, and one graph rounds in one way.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    conditions = randn(3, 7, 16).bfloat16()
    unet = UNet2DConditionModel(**TINY, cross_attention_dim=16).bfloat16()
    policy = Policy(unet, Conditions(conditions), guidance_scale=5.0, rank=2)
    policy.optimise(compile="blocks")
    policy.static_rows = (3,)
    x, timestep, prompt = randn(5, 4, 8, 8), torch.full((5,), 501), torch.tensor([0, 1, 1, 0, 0])
    with torch.no_grad():
        sampled = policy(x, timestep, prompt)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0 and not sampled.requires_grad
    leaf = x[:3].clone().requires_grad_()
    output, reference = policy(leaf, timestep[:3], prompt[:3]), policy.reference(leaf, timestep[:3], prompt[:3])
    assert output.requires_grad and output.any()
    rows = torch.cat([torch.arange(3), 5 + torch.arange(3)])
    assert torch.equal(output, sampled[rows]) and torch.equal(output, reference)
    for parameter in policy.trainable():
        parameter.data.add_(0.1)
    changed = policy(leaf, timestep[:3], prompt[:3])
    assert not torch.equal(changed, output)
    assert torch.equal(policy.reference(leaf, timestep[:3], prompt[:3]), reference)
    gradients = torch.autograd.grad(changed.float().square().sum(), policy.weights())
    assert all(gradient.any() for gradient in gradients)
    for scale, expected in ((0.0, reference), (1.0, changed)):
        with policy.scaled_lora(scale):
            assert torch.equal(policy(leaf, timestep[:3], prompt[:3]), expected)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_compiled_code_is_kept_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fastnabla's own folder, one for each instruction set, unless TORCHINDUCTOR_CACHE_DIR names another one. Code for a product
    is Python that calls torch, so no C++ compiler is waited for."""

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that the variable is put back

    def hits(cache: Path) -> int:
        """Of what torch.compile looks for, forgetful as a new process, in a user's `cache`."""
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        torch._dynamo.reset()
        counters.clear()
        x = torch.ones(4, 4, requires_grad=True)
        compiling.compiled(lambda x: x @ x)(x).sum().backward()
        return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]

    assert hits(tmp_path) == 0
    assert any((tmp_path / "fastnabla" / "compiled").iterdir())
    assert hits(tmp_path) > 0
    assert hits(tmp_path / "other") == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
        assert hits(tmp_path) == 0
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert compiling.compiled_code_folder() == Path("elsewhere")
