"""The scaling model, where its values are known."""

import math

import pytest

from bench.scaling import Machine, Work, overhead_seconds, reduce_seconds, ring_seconds, slowest, table, work_of
from fastnabla.cost.planner import unit_costs
from fastnabla.training.trainer import Trainer
from tests.faults import tiny

FREE = Machine(rate=1e12, gpus=4, within=math.inf, between=math.inf, latency=0, host=0)
WORK = Work(rollout=2e12, step=3e12, reduced=400)


def test_a_ring() -> None:
    assert ring_seconds(1e9, 1, 1e9, 1) == 0
    assert ring_seconds(1e9, 2, 1e9, 0) == 1  # half of it, there and back
    assert ring_seconds(1e9, 1000, 1e9, 0) == pytest.approx(2, rel=2e-3)
    assert ring_seconds(0, 5, 1e9, 0.25) == 2


def test_nodes_sum_a_part_for_each_of_their_gpus() -> None:
    machine = Machine(rate=1, gpus=4, within=100.0, between=10.0, latency=0, host=0)
    assert reduce_seconds(400, 1, machine) == ring_seconds(400, 4, 100, 0)
    assert reduce_seconds(400, 3, machine) == ring_seconds(400, 4, 100, 0) + ring_seconds(100, 3, 10, 0)


def test_the_slowest_of_two() -> None:
    """E max = 2 Φ(σ/√2) for two lognormal times of mean 1."""
    sigma = math.sqrt(math.log1p(0.3**2))
    expected = 1 + math.erf(sigma / 2)
    # 40,000 trials: a standard error of 0.3 / 200.
    assert slowest(2, 0.3, 40_000, seed=0) == pytest.approx(expected, abs=0.006)
    assert slowest(1, 0.3, 40_000, seed=0) == pytest.approx(1, abs=0.006)
    assert slowest(64, 0.0, 10, seed=0) == 1
    assert slowest(8, 0.1, 1000, seed=0) < slowest(512, 0.1, 1000, seed=0)


def test_without_overhead_only_what_cannot_be_divided_costs() -> None:
    assert overhead_seconds(WORK, 64, FREE) == 0
    rows = table(WORK, FREE, None, 24, [0.0], trials=1, seed=0)
    # On 4, 8 and 16 GPUs; on 32 some would have none.
    assert [row[:4] for row in rows] == [
        ("1", "24", "6", "30.00"),
        ("2", "24", "3", "15.00"),
        ("4", "24", "2", "10.00"),
    ]
    assert [row[-1] for row in rows] == ["100.0%", "100.0%", "75.0%"]
    assert {row[-1] for row in table(WORK, FREE, 3, 0, [0.0], trials=1, seed=0)} == {"100.0%"}


@pytest.mark.slow
def test_the_bytes_are_those_of_the_gradients() -> None:
    config = tiny()
    work, costs = work_of(config), unit_costs(config)
    assert work.reduced == sum(parameter.nbytes for parameter in Trainer.from_config(config).step.replicated)
    assert work.rollout == pytest.approx(2 * costs.network_flops + costs.decode_flops / 2)
