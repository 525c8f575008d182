"""Assigning prompts to trajectories."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastnabla.prompts import assign_prompts
from fastnabla.utils.seeding import generator_of


def assign_one_by_one(seed: int, first: int, count: int, num_prompts: int) -> Tensor:
    """By definition, trajectory n gets entry n mod P of the order of cycle n // P."""
    numbers = torch.zeros(count, dtype=torch.int64)
    for i, n in enumerate(range(first, first + count)):
        order = torch.randperm(num_prompts, generator=generator_of(seed, "prompts", n // num_prompts))
        numbers[i] = order[n % num_prompts]
    return numbers


def test_every_cycle_sees_each_prompt_once_in_an_order_of_its_own():
    cycles = assign_prompts(seed=3, first=0, count=40, num_prompts=10).split(10)
    assert all(sorted(cycle.tolist()) == list(range(10)) for cycle in cycles)
    assert len({tuple(cycle.tolist()) for cycle in cycles}) == 4
    assert not torch.equal(torch.cat(cycles), assign_prompts(4, 0, 40, 10))


def test_assignment_does_not_change_between_versions():
    assert assign_prompts(3, 2, 10, 5).tolist() == [0, 1, 4, 2, 3, 1, 4, 0, 3, 4]


@given(
    seed=st.integers(0, 2**40),
    first=st.integers(0, 10**12) | st.integers(0, 20),
    count=st.integers(0, 30),
    num_prompts=st.integers(1, 12),
)
def test_assignment_is_as_defined(seed: int, first: int, count: int, num_prompts: int):
    found = assign_prompts(seed, first, count, num_prompts)
    expected = assign_one_by_one(seed, first, count, num_prompts)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


@given(
    first=st.integers(0, 50),
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    num_prompts=st.integers(1, 30),
)
def test_parts_of_a_range_get_what_the_whole_gets(first: int, counts: list[int], num_prompts: int):
    whole = assign_prompts(7, first, sum(counts), num_prompts)
    starts = [first + sum(counts[:i]) for i in range(len(counts))]
    parts = [assign_prompts(7, start, count, num_prompts) for start, count in zip(starts, counts, strict=True)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("first", [0, 10**6 - 32], ids=["one cycle", "two cycles"])
def test_a_million_prompts_take_less_than_a_second(first: int):
    started = time.perf_counter()
    numbers = assign_prompts(0, first, 64, 10**6)
    assert time.perf_counter() - started < 1
    assert numbers.shape == (64,) and numbers.min() >= 0 and numbers.max() < 10**6
