"""Loading pipelines: what is accepted, what is refused, and how it is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.pipeline import encode_prompts, pipeline_of
from fastnabla.testbed import pipeline_folder

TESTBED = ModelConfig(name="testbed", dtype="float32")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the testbed's pipeline to damage."""
    return Path(shutil.copytree(pipeline_folder(), tmp_path / "pipeline"))


def test_unknown_model_names_the_field_and_the_download_command() -> None:
    with pytest.raises(ValueError, match=r"model\.name = 'no/such/model'.*hf download no/such/model"):
        pipeline_of(ModelConfig(name="no/such/model"))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_pipeline_without_a_part_is_refused(copy: Path, part: str) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    index[part] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"model\.name = .*{part}"):
        pipeline_of(ModelConfig(name=str(copy)))


def test_a_diffusers_that_ignores_the_dtype_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load = StableDiffusionPipeline.from_pretrained
    monkeypatch.setattr(
        StableDiffusionPipeline, "from_pretrained", lambda name, dtype, **options: load(name, **options)
    )
    with pytest.raises(
        ValueError, match=r"model\.dtype = 'bfloat16': .* loaded .* in torch\.float32\. Install a newer"
    ):
        pipeline_of(ModelConfig(name="testbed", dtype="bfloat16"))
    pipeline_of(TESTBED)


def test_first_condition_is_the_empty_prompt() -> None:
    pipeline = pipeline_of(TESTBED)
    conditions = encode_prompts(pipeline, ["a cat", "a dog", "a cat"])
    text = conditions.text
    assert text.shape == (4, pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.hidden_size)
    assert torch.equal(text[1], text[3]) and not torch.equal(text[1], text[2])
    torch.testing.assert_close(text[:1], encode_prompts(pipeline, [""]).text[1:])
    assert conditions.pooled is None and not conditions.shared
