"""The memory plan: what it chooses for Stable Diffusion, and what it counts."""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastnabla.config.methods import METHODS
from fastnabla.config.model_sections import LoraConfig, ModelConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import MemoryConfig, RolloutConfig
from fastnabla.cost import planner
from fastnabla.cost.planner import (
    ENOUGH,
    MAX_MICRO_BATCH,
    USABLE_FRACTION,
    DoesNotFit,
    MemoryPlan,
    plan_memory,
    planned,
    unit_costs,
)
from fastnabla.cost.reward_bytes import RewardBytes
from fastnabla.models import pipeline as pipelines
from fastnabla.models.pipeline import family_of_pipeline, network_of, pipeline_of
from fastnabla.models.quantised_linear import weight_bytes
from fastnabla.objective.settings import Objective
from fastnabla.trajectories.buffer import TrajectoryBuffer
from tests.cost.test_unit_costs import stable_diffusion as costs_of
from tests.families import save_tiny

CPU = torch.device("cpu")
shallow = functools.partial(costs_of, shallow=True)


def plan(gigabytes: float, rank: int = 8, **memory) -> MemoryPlan:
    config = TrainConfig(vram=gigabytes, lora=LoraConfig(rank=rank), memory=MemoryConfig(**memory))
    return plan_memory(config, shallow(rank), int(gigabytes * 1e9), CPU)


@pytest.mark.slow
def test_plans_fit_and_grow() -> None:
    """With more memory nothing is recomputed that was not before; micro-batches grow, but beyond `ENOUGH` not at the
    price of recomputing or of smaller chunks."""
    plans = [plan(gigabytes) for gigabytes in (4, 5, 6, 8, 10, 12, 14, 20, 32)]
    for chosen in plans:
        assert chosen.total <= USABLE_FRACTION * chosen.budget
    for less, more in itertools.pairwise(plans):
        assert min(less.micro_batch, ENOUGH[0]) <= min(more.micro_batch, ENOUGH[0])
        kept = [
            (not p.checkpoint_network, not p.checkpoint_decoder, p.decode_chunk, p.micro_batch) for p in (less, more)
        ]
        assert kept[0] <= kept[1]
    assert plans[0].checkpoint_network
    assert plans[-1].micro_batch == MAX_MICRO_BATCH


@pytest.mark.slow
def test_a_pinned_buffer_is_counted_in_the_hosts_memory() -> None:
    """As many bytes as on the device, to the byte; the device has that much more room."""
    on_device, pinned = (
        plan_memory(
            TrainConfig(vram=24, memory=MemoryConfig(buffer=buffer, output_block=64)),
            shallow(),
            int(24e9),
            torch.device("cuda"),
        )
        for buffer in ("device", "pinned")
    )
    trajectories, config = TrainConfig().rollout.trajectories, TrainConfig(memory=MemoryConfig(output_block=64))
    slabs = TrajectoryBuffer(1, config.sampler.steps, config.drawn_steps + 1, (4, 64, 64), output_block=64)
    assert on_device.host == pinned.fixed["trajectory buffer"] == 0
    assert pinned.host == on_device.fixed["trajectory buffer"] == trajectories * slabs.nbytes
    for chosen, shown in ((on_device, False), (pinned, True)):
        rows = list(chosen.table().columns[0].cells)
        assert ("trajectory buffer, in host memory" in rows) == shown


@pytest.mark.slow
def test_activations_of_rewards_count() -> None:
    """Those of hpsv2, once for each image of a chunk; its weights once."""
    without = plan(24)
    rewards = RewardBytes(3_900_000_000, 435_000_000)
    chosen = plan_memory(TrainConfig(vram=24), shallow(), int(24e9), CPU, rewards)
    assert chosen.total <= USABLE_FRACTION * chosen.budget
    assert chosen.fixed["reward networks"] == rewards.weights
    assert (chosen.micro_batch, chosen.decode_chunk) < (without.micro_batch, without.decode_chunk)
    settings = (shallow(), chosen.micro_batch, chosen.decode_chunk, False, False)
    more = chosen.step["step, while decoding"] - planner._step(*settings)["step, while decoding"]
    assert more == chosen.decode_chunk * rewards.image


@pytest.fixture(scope="module")
def sd35(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny("sd35", tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd35"])
def test_prompt_embeddings_take_what_is_planned(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte if all fit on the device, or if a call needs more than `DEVICE_BYTES`; else to less than a prompt."""
    config = TrainConfig(
        model=ModelConfig(name=save_tiny(family, tmp_path), dtype="float32"),
        rollout=RolloutConfig(trajectories=24, updates=2, batch=8),
    )
    costs, pipeline = unit_costs(config), pipeline_of(config.model)
    each = sum(table.nbytes for table in family_of_pipeline(pipeline).encode_nothing(pipeline))
    for rows, prompts, planned_rows in ((20, 5, 6), (20, 19, 20), (20, 30, 20), (10, 30, 13), (10, 11, 12)):
        for module in (planner, pipelines):
            monkeypatch.setattr(module, "DEVICE_BYTES", rows * each + each // 2)
        conditions = pipelines.encode_prompts(pipeline, [f"{i} dogs" for i in range(prompts)])
        for at_once in (8, 12):
            conditions.ensure(torch.arange(min(at_once, prompts)))
        held = sum(table.nbytes for table in (conditions.text, conditions.pooled) if table is not None)
        assert held == planned_rows * each
        extra = each // 2 if (rows, prompts) == (20, 30) else 0
        assert planner.embedding_bytes(config, costs, prompts) == held + extra
    assert planner.embedding_bytes(config, costs) == 13 * each, "of any list, with the larger update"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_take_what_is_planned(kind: str, sd35: str) -> None:
    """To the byte. Activations are the unquantised network's; the largest layer's weights, dequantised, come on top. A
    pass moves more, because the weights are written and read again."""
    model = ModelConfig(name=sd35, dtype="float32")
    plain, quantised = (
        unit_costs(TrainConfig(model=dataclasses.replace(model, quantise=each))) for each in ("none", kind)
    )
    layers = [m for m in network_of(pipeline_of(model)).modules() if isinstance(m, nn.Linear)]
    weights, inputs = ([getattr(layer, name) for layer in layers] for name in ("weight", "in_features"))
    counts = [weight.numel() for weight in weights]
    codes = {
        "int8": [n + 4 * n // into for n, into in zip(counts, inputs, strict=True)],
        "nf4": [n // 2 + 4 * math.ceil(n / 64) for n in counts],
    }[kind]
    before, after = (weight_bytes(costs.shapes.network) for costs in (plain, quantised))
    assert before - after == 4 * sum(counts) - sum(codes)
    loaded = network_of(pipeline_of(dataclasses.replace(model, quantise=kind)))
    lora = sum(weight.nbytes for weight in quantised.shapes.network.parameters() if weight.requires_grad)
    assert after == weight_bytes(loaded) + lora
    ours, theirs = (costs.network_bytes(False) for costs in (quantised, plain))
    assert (ours.kept, ours.peak) == (theirs.kept, theirs.peak + 4 * max(counts))
    assert quantised.network_traffic(1).forward > plain.network_traffic(1).forward


@pytest.mark.slow
def test_a_plan_has_room_for_the_prompts() -> None:
    """118 kB each for Stable Diffusion 1.5, up to 256 MiB."""
    config, costs = TrainConfig(vram=24), shallow()
    sizes = [
        plan_memory(config, costs, int(24e9), CPU, prompts=prompts).fixed["prompt embeddings"]
        for prompts in (49, 1_000_000, None)
    ]
    assert sizes == [50 * 2 * 77 * 768, 2**28, 2**28]


@pytest.mark.slow
def test_full_finetuning() -> None:
    """Gradients and casts of 860 M weights are counted by network, not by transition."""
    chosen = plan(80, rank=0)
    assert chosen.micro_batch == MAX_MICRO_BATCH and not chosen.checkpoint_network
    phase = "step, in backward passes"
    assert chosen.step[phase] < 1.2 * plan(80).step[phase]
    with pytest.raises(DoesNotFit, match=r"^vram = 3\.0 GB"):
        plan(3, rank=0)


@pytest.mark.slow
def test_sharded_full_finetuning() -> None:
    """By the arithmetic of docs/full-finetuning.md for P parameters in bfloat16: 4 P whole, of both networks, and a share of 4 P
    of masters, 2 P of the frozen copy, 4 P of gradients and 8 P of moments."""
    costs = shallow(0)
    config = TrainConfig(vram=80, lora=LoraConfig(rank=0))
    alone, eight = (plan_memory(config, costs, int(80e9), CPU, ranks=ranks).fixed for ranks in (1, 8))
    parameters = sum(p.numel() for p in costs.shapes.network.parameters())
    saved = sum(alone.values()) - sum(eight.values())
    assert saved == pytest.approx((18 - (4 + 18 / 8)) * parameters, rel=1e-5)
    replicated = dataclasses.replace(config, memory=MemoryConfig(shard=False))
    assert plan_memory(replicated, costs, int(80e9), CPU, ranks=8).fixed == alone
    assert plan_memory(TrainConfig(vram=80), shallow(), int(80e9), CPU, ranks=8).fixed == plan(80).fixed


@pytest.mark.slow
def test_fixed_settings_are_respected() -> None:
    chosen = plan(24, micro_batch=2, decode_chunk=1, checkpoint_network=True, checkpoint_decoder=True)
    assert (chosen.micro_batch, chosen.decode_chunk) == (2, 1)
    assert chosen.checkpoint_network and chosen.checkpoint_decoder
    assert plan(24, micro_batch=3).micro_batch == 3
    assert plan(10, micro_batch=12).checkpoint_network


@pytest.mark.slow
def test_second_derivatives_are_planned_without_checkpoints() -> None:
    """Where a plan without them has checkpoints, there are none, or nothing fits."""
    first, second = (TrainConfig(objective=Objective(reverse_second_order=on)) for on in (False, True))
    for gigabytes, fits in ((4, False), (5, True)):
        size = int(gigabytes * 1e9)
        assert plan_memory(first, shallow(), size, CPU).checkpoint_network
        with contextlib.nullcontext() if fits else pytest.raises(DoesNotFit):
            assert not plan_memory(second, shallow(), size, CPU).checkpoint_network


@pytest.mark.slow
@pytest.mark.parametrize(("gigabytes", "memory"), [(3, {}), (10, {"micro_batch": 8, "checkpoint_network": False})])
def test_what_does_not_fit_fits_into_what_is_said_to_be_needed(gigabytes: int, memory: dict) -> None:
    with pytest.raises(DoesNotFit, match=rf"^vram = {gigabytes}\.0 GB: the smallest settings need about ") as caught:
        plan(gigabytes, **memory)
    needed = float(str(caught.value).split("need about ")[1].split(" GB")[0])
    assert needed > gigabytes
    plan(needed + 0.06, **memory)
    with pytest.raises(DoesNotFit):
        plan(needed - 0.06, **memory)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["residual-db", "draft", "ddpo"])
def test_what_would_fit_is_within_the_method(method: str) -> None:
    """Each option that the error names is accepted."""
    config = TrainConfig(method=method, vram=1, model=ModelConfig(dtype="float32"))
    with pytest.raises(DoesNotFit, match=r"Use a smaller model or --model\.dtype bfloat16") as caught:
        plan_memory(config, shallow(), int(1e9), CPU)
    options = dict(re.findall(r"--([\w.]+) (\w+)", str(caught.value)))
    assert all(METHODS[method].accepts(field, value) for field, value in options.items())
    assert ("flow.kind" in options, "memory.buffer" in options) == (METHODS[method].has_flow, METHODS[method].stores)


def test_complete_settings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "unit_costs", lambda config: shallow())
    config = TrainConfig(memory=MemoryConfig(micro_batch=3, decode_chunk=2))
    complete, none = planned(config, CPU)
    assert none is None
    assert complete.memory == MemoryConfig(
        micro_batch=3, decode_chunk=2, checkpoint_decoder=False, checkpoint_network=False
    )
    assert planned(complete, CPU) == (complete, None)
    opened, chosen = planned(dataclasses.replace(TrainConfig(), vram=24), CPU)
    assert chosen is not None and opened.memory == chosen.settings(MemoryConfig())


def test_memory_that_an_earlier_run_left_to_the_allocator_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 GB the allocator holds 20, of which 3 are in use."""
    sizes = {"mem_get_info": (4, 24), "memory_reserved": 20, "memory_allocated": 3}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    assert planner.free_bytes(torch.device("cuda")) == 21
