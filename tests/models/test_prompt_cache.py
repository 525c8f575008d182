"""Prompts that are encoded when they are needed: the same numbers as encoding them at once, in bounded memory."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models import pipeline as pipelines
from fastnabla.models.conditions import Conditions
from fastnabla.models.pipeline import encode_prompts, pipeline_of, text_encoders
from fastnabla.models.prompt_cache import PromptCache
from fastnabla.training.trainer import Trainer
from tests.families import save_tiny
from tests.faults import assert_same_result, tiny, without_pictures
from tests.training.test_trainer import interrupt

PROMPTS = [f"a {animal}" for animal in ("cow", "cat", "dog", "sheep", "bear", "horse")]


def build(capacity: int = 3, pooled: bool = False) -> tuple[PromptCache, list[list[str]]]:
    """A cache of embeddings that tell which prompt they are of, and what it has asked for."""
    asked = []

    def encode(texts):
        asked.append(list(texts))
        values = [torch.full((1, 2, 4), 1.0 + PROMPTS.index(text)) for text in texts]
        return [(value, 10 * value[:, 0]) if pooled else (value,) for value in values]

    unconditional = (torch.zeros(1, 2, 4), torch.zeros(1, 4)) if pooled else (torch.zeros(1, 2, 4),)
    return PromptCache(
        PROMPTS, encode, unconditional, {"time_ids": torch.arange(6)} if pooled else None, capacity
    ), asked


def seen(cache: PromptCache, *numbers: int) -> list[float]:
    prompt = torch.tensor(numbers)
    cache.ensure(prompt)
    assert torch.equal(cache(prompt, guided=False)["text"], cache.of_prompts(prompt))
    return cache.of_prompts(prompt)[:, 1, 2].tolist()


def test_each_is_encoded_when_it_is_needed_and_those_needed_last_are_kept() -> None:
    cache, asked = build()
    assert seen(cache, 2, 0, 2) == [3, 1, 3] and len(cache.text) == 3
    assert seen(cache, 0) == [1] and seen(cache, 5, 0) == [6, 1]
    assert asked == [[PROMPTS[2], PROMPTS[0]], [PROMPTS[5]]]
    assert seen(cache, 1) == [2]  # in place of 2
    assert seen(cache, 0, 5, 1) == [1, 6, 2] and len(asked) == 3
    assert seen(cache, 2, 3) == [3, 4] and asked[3:] == [[PROMPTS[2], PROMPTS[3]]] and len(cache.text) == 4


def test_as_many_as_are_needed_at_once_are_kept() -> None:
    cache, asked = build(capacity=2)
    assert seen(cache, 0) == [1]
    assert seen(cache, 5, 4, 3, 2) == [6, 5, 4, 3] and len(cache.text) == 5
    assert seen(cache, *range(6)) == [1, 2, 3, 4, 5, 6] and len(cache.text) == 7
    assert sum(map(len, asked)) in (6, 7)


def test_one_that_is_not_there_is_an_error() -> None:
    cache, _ = build(capacity=1)
    for number in (4, 1):
        seen(cache, number)
    for absent in (4, 0):
        with pytest.raises(IndexError):
            cache.of_prompts(torch.tensor([absent]))


def test_all_that_xl_is_told_comes_with_them() -> None:
    cache, _ = build(pooled=True)
    prompt = torch.tensor([3, 1])
    cache.ensure(prompt)
    told = cache(prompt, guided=True)
    assert told["text"][:, 0, 0].tolist() == [0, 0, 4, 2]
    assert told["pooled"][:, 0].tolist() == [0, 0, 40, 20]
    assert told["time_ids"].shape == (4, 6)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_they_are_the_pipelines_whatever_was_encoded_before(family: str, tmp_path: Path) -> None:
    """Bit for bit one at a time; from a batch, whose sums may be in another order, to rounding."""
    pipeline = pipeline_of(ModelConfig(name=save_tiny(family, tmp_path), dtype="float32"))
    at_once, one, other = encode_prompts(pipeline, PROMPTS), *(encode_prompts(pipeline, PROMPTS, 3) for _ in range(2))
    assert type(at_once) is Conditions and type(one) is type(other) is PromptCache
    other.ensure(torch.tensor([5, 1]))
    for number in range(6):
        prompt = torch.tensor([number])
        told = []
        for conditions in (at_once, one, other):
            conditions.ensure(prompt)
            arguments = conditions(prompt, guided=True)
            told.append([arguments["text"], *arguments.get("added_cond_kwargs", {}).values()])
        assert all(map(torch.equal, told[1], told[2]))
        for alone, batched in zip(told[1], told[0], strict=True):
            torch.testing.assert_close(alone, batched, rtol=1e-5, atol=1e-6)
    assert {encoder.device.type for encoder in text_encoders(pipeline)} == {"cpu"}


def test_a_method_that_samples_in_its_step_finds_its_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on bit for bit in a process that has encoded none of them. Those with a rollout: `test_extending.py`."""
    monkeypatch.setattr(pipelines, "CAPACITY", 1)
    config = dataclasses.replace(tiny(), method="refl")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    first = without_pictures(Trainer.from_config(config))
    assert isinstance(first.policy.conditions, PromptCache)
    first.train(whole)
    second = without_pictures(Trainer.from_config(config))
    interrupt(second, 4)
    with pytest.raises(KeyboardInterrupt):
        second.train(cut)
    without_pictures(Trainer.from_config(config)).train(cut, resume=True)
    assert_same_result(cut, whole)
