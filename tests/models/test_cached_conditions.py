"""Prompts that the device does not hold all at once: the same numbers as if it did, in bounded memory."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models import pipeline as pipelines
from fastnabla.models.cached_conditions import CachedConditions
from fastnabla.models.conditions import Conditions
from fastnabla.models.encoded_prompts import EncodedPrompts
from fastnabla.models.pipeline import encode_prompts, pipeline_of, text_encoders
from fastnabla.models.policy import Policy
from fastnabla.training.trainer import Trainer
from tests.checks import randn
from tests.families import save_tiny
from tests.faults import assert_same_result, tiny
from tests.kernel_cases import GPU
from tests.runs import interrupt, without_pictures

PROMPTS = [f"a {animal}" for animal in ("cow", "cat", "dog", "sheep", "bear", "horse")]
TEXT, POOLED = randn(6, 2, 4, seed=1), randn(6, 3, seed=2)
SHAPES = pytest.mark.parametrize("pooled", [False, True], ids=["text", "text and pooled"])


def build(
    on_device: int = 3, on_host: int = 6, pooled: bool = False, device: str = "cpu"
) -> tuple[CachedConditions, list[list[int]]]:
    """Conditions whose tables hold `on_device` prompts, of which host memory holds `on_host`; and the prompts of each call that
    encodes some."""
    asked = []

    def encode(texts):
        numbers = [PROMPTS.index(text) for text in texts]
        asked.append(numbers)
        return [(TEXT[i], POOLED[i]) if pooled else (TEXT[i],) for i in numbers]

    unconditional = (torch.zeros(1, 2, 4, device=device), torch.zeros(1, 3, device=device))[: 1 + pooled]
    each = sum(table.nbytes for table in unconditional)
    encoded = EncodedPrompts(PROMPTS, encode, each, on_host * each)
    shared = {"time_ids": torch.arange(6)} if pooled else {}
    return CachedConditions(6, encoded, unconditional, shared, (1 + on_device) * each), asked


def use(conditions: CachedConditions, *numbers: int) -> None:
    """Look prompts up, and compare them with their embeddings bit for bit."""
    prompt = torch.tensor(numbers)
    conditions.ensure(prompt)
    rows = prompt.to(conditions.device)
    found = {name: value.cpu() for name, value in conditions(rows, guided=False).items()}
    assert torch.equal(found["text"], TEXT[prompt])
    assert torch.equal(found["text"], conditions.of_prompts(rows).cpu())
    assert "pooled" not in found or torch.equal(found["pooled"], POOLED[prompt])


def nbytes(conditions: Conditions) -> int:
    return sum(table.nbytes for table in (conditions.text, conditions.pooled) if table is not None)


def test_each_is_encoded_on_first_use_and_those_used_last_are_on_the_device() -> None:
    conditions, asked = build(on_device=2)
    use(conditions, 2, 0, 2)
    use(conditions, 0)
    use(conditions, 5, 0)  # in place of 2
    assert asked == [[2, 0], [5]] and list(conditions._row_of) == [0, 5]
    use(conditions, 1)  # in place of 0, which was used last before 5 was
    assert asked[2:] == [[1]] and list(conditions._row_of) == [5, 1]


@pytest.mark.parametrize("device", ["cpu", GPU])
@SHAPES
def test_what_the_device_evicts_comes_back_without_being_encoded_again(pooled: bool, device: str) -> None:
    conditions, asked = build(on_device=2, pooled=pooled, device=device)
    held = nbytes(conditions)
    assert held == 3 * sum(table.nbytes for table in (TEXT[0], POOLED[0])[: 1 + pooled])
    for pair in [*itertools.combinations(range(6), 2)] * 2:
        use(conditions, *pair)
    assert sorted(itertools.chain(*asked)) == list(range(6))
    assert nbytes(conditions) == held


@SHAPES
def test_what_host_memory_evicts_is_encoded_again(pooled: bool) -> None:
    conditions, asked = build(on_device=1, on_host=2, pooled=pooled)
    for number in (0, 1, 0, 2):
        use(conditions, number)
    use(conditions, 0)  # in host memory: it was used after 1
    assert asked == [[0], [1], [2]]
    use(conditions, 1)
    assert asked[3:] == [[1]] and list(conditions.fetch._kept) == [0, 1]


def test_a_use_on_the_device_counts_in_host_memory() -> None:
    conditions, asked = build(on_device=2, on_host=3)
    for number in (0, 1, 0, 2, 3):
        use(conditions, number)
    use(conditions, 0)  # 1 was evicted, because 0 was used after it
    assert asked == [[0], [1], [2], [3]]


@SHAPES
def test_a_call_may_need_more_than_either_keeps(pooled: bool) -> None:
    conditions, asked = build(on_device=2, on_host=3, pooled=pooled)
    use(conditions, 0)
    use(conditions, 5, 4, 3, 2)
    assert len(conditions.text) == 5 and asked == [[0], [5, 4, 3, 2]] and len(conditions.fetch._kept) == 3
    use(conditions, *range(6))
    assert len(conditions.text) == 7 and len(conditions.fetch._kept) == 3
    nothing, _ = build(on_device=-1, on_host=0, pooled=pooled)
    for numbers in ((3,), (1, 3), (0,)):
        use(nothing, *numbers)
        assert not nothing.fetch._kept
    assert len(nothing.text) == 3


def test_one_that_is_not_there_is_an_error() -> None:
    conditions, _ = build(on_device=1)
    use(conditions, 4)
    use(conditions, 1)
    for absent in (4, 0):
        with pytest.raises(IndexError):
            conditions.of_prompts(torch.tensor([absent]))


def test_unconditional_rows_and_shared_conditions_come_with_them() -> None:
    conditions, _ = build(pooled=True)
    prompt = torch.tensor([3, 1])
    conditions.ensure(prompt)
    found = conditions(prompt, guided=True)
    assert torch.equal(found["text"], torch.cat([torch.zeros(2, 2, 4), TEXT[prompt]]))
    assert torch.equal(found["pooled"], torch.cat([torch.zeros(2, 3), POOLED[prompt]]))
    assert found["time_ids"].shape == (4, 6)


@pytest.mark.slow
@pytest.mark.parametrize("others", [(1,), (1, 2, 3)], ids=["its row is overwritten", "the tables are replaced"])
def test_a_graph_outlives_its_prompts(others: tuple[int, ...], tmp_path: Path) -> None:
    """Gradients of a network whose blocks are recomputed after its prompt has left the device."""
    pipeline = pipeline_of(ModelConfig(name=save_tiny("sd15", tmp_path), dtype="float32"))
    rows = randn(4, 5, 16, seed=3)
    conditions = CachedConditions(4, lambda numbers: [(rows[i],) for i in numbers], (rows[:1],), {}, 2 * rows[0].nbytes)
    policy = Policy(pipeline.unet, conditions, 3.0, rank=0)
    policy.optimise(checkpoint=True)

    def gradients(between: tuple[int, ...]) -> list[torch.Tensor]:
        conditions.ensure(torch.tensor([0]))
        output = policy(randn(1, 4, 8, 8), torch.full((1,), 500.0), torch.tensor([0]))
        conditions.ensure(torch.tensor(between))
        return torch.autograd.grad(output.square().sum(), policy.trainable())

    expected = gradients((0,))
    assert all(map(torch.equal, gradients(others), expected)) and 0 not in conditions._row_of


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd35", "flux"])
def test_bytes_alone_decide_and_no_number_depends_on_what_was_encoded_before(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings from host memory are those on the device. Those of prompts encoded by themselves differ from them by
    rounding, since sums of a batch may be in another order, but not by the prompts encoded before."""
    pipeline = pipeline_of(ModelConfig(name=save_tiny(family, tmp_path), dtype="float32"))
    all_on_device = encode_prompts(pipeline, PROMPTS)
    each = nbytes(all_on_device) // 7

    def encoded(on_device: int, on_host: int) -> Conditions:
        monkeypatch.setattr(pipelines, "DEVICE_BYTES", on_device)
        monkeypatch.setattr(pipelines, "HOST_BYTES", on_host)
        return encode_prompts(pipeline, PROMPTS)

    assert type(encoded(7 * each, 6 * each)) is type(all_on_device) is Conditions
    on_host = encoded(7 * each - 1, 6 * each)
    with monkeypatch.context() as patch:  # as if the text encoders were smaller than the embeddings
        patch.setattr(pipelines, "text_encoders", lambda _: [torch.nn.Linear(6 * each // 4 - 1, 1, bias=False)])
        assert isinstance(encoded(7 * each - 1, 6 * each).fetch, EncodedPrompts)
        assert type(encoded(7 * each, 6 * each)) is Conditions
    lazy, other = (encoded(3 * each, 6 * each - 1) for _ in range(2))
    assert type(on_host) is type(lazy) is CachedConditions and nbytes(on_host) == 6 * each and nbytes(lazy) == 3 * each
    assert isinstance(lazy.fetch, EncodedPrompts) and not isinstance(on_host.fetch, EncodedPrompts)
    other.ensure(torch.tensor([5, 1]))
    for number in (*range(6), 0):
        prompt = torch.tensor([number])
        found = []
        for conditions in (all_on_device, on_host, lazy, other):
            conditions.ensure(prompt)
            found.append(list(conditions(prompt, guided=True).values()))
        batched, from_host, alone, after_others = found
        assert all(map(torch.equal, batched, from_host)) and all(map(torch.equal, alone, after_others))
        for one, of_batch in zip(alone, batched, strict=True):
            torch.testing.assert_close(one, of_batch, rtol=1e-5, atol=1e-6)
    kept = [tensor for embeddings in lazy.fetch._kept.values() for tensor in embeddings]
    assert len(lazy.fetch._kept) == 5
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 5 * each  # no views of larger tensors
    assert {encoder.device.type for encoder in text_encoders(pipeline)} == {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("on_host", [1, 100])
def test_a_method_that_samples_in_its_step_finds_its_prompts(
    on_host: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on bit for bit in a process that has encoded none of them; in the testbed a prompt has 4 KiB. Methods with a
    rollout: `test_extending.py`."""
    monkeypatch.setattr(pipelines, "DEVICE_BYTES", 2 * 4096)
    monkeypatch.setattr(pipelines, "HOST_BYTES", on_host * 4096)
    config = dataclasses.replace(tiny(), method="refl")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    first = without_pictures(Trainer.from_config(config))
    assert isinstance(first.policy.conditions, CachedConditions)
    first.train(whole)
    second = without_pictures(Trainer.from_config(config))
    interrupt(second, 4)
    with pytest.raises(KeyboardInterrupt):
        second.train(cut)
    without_pictures(Trainer.from_config(config)).train(cut, resume=True)
    assert_same_result(cut, whole)
