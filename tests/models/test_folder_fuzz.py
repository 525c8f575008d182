"""Whatever is in a model's configuration files, in a header of safetensors, or in a LoRA: it is loaded as it says, or refused in
one line that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastnabla.config.model_sections import ModelConfig
from fastnabla.config.train import TrainConfig
from fastnabla.models.conditions import Conditions
from fastnabla.models.pipeline import pipeline_of
from fastnabla.models.policy import Policy
from fastnabla.models.random_init import random_pipeline
from fastnabla.models.saved_policy import LORA_FILE, load_policy, read_policy, save_policy
from fastnabla.training.check_model import check_model
from fastnabla.utils.safetensors_file import read_tensors
from tests.config.test_config_fuzz import ODD, VALUES
from tests.families import TINY
from tests.lies import DATA, file_of, tensor

FILES = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)
SETTINGS = VALUES | st.sampled_from(["gelu", "linear", "v_prediction", [8, 16], [8, 8], ["diffusers", "DDPMScheduler"]])


def assert_one_line(error: ValueError, name: str) -> None:
    message = str(error)
    assert name in message and "\n" not in message.strip() and len(message) < 5000, message


@pytest.mark.slow
@given(data=st.data(), file=st.sampled_from(FILES))
@settings(max_examples=8)
def test_any_setting_of_a_model(data: st.DataObject, file: str, saved: Path) -> None:
    """Checked without weights first; what passes is loaded."""
    original = (saved / file).read_text()
    values: dict[str, Any] = json.loads(original)
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(values)) | ODD, SETTINGS, min_size=1, max_size=2))
    config = TrainConfig(model=ModelConfig(name=str(saved), dtype="float32"))
    try:
        (saved / file).write_text(json.dumps(values | changes))
        check_model(config)
        pipeline_of(config.model)
    except ValueError as error:
        assert_one_line(error, "sampler." if str(error).startswith("sampler.") else "model.name")
    finally:
        (saved / file).write_text(original)


@given(file=st.sampled_from(FILES), content=st.binary(max_size=60) | VALUES.map(lambda v: json.dumps(v).encode()))
@settings(max_examples=10)
def test_any_bytes_for_a_model_s_configuration(file: str, content: bytes, saved: Path) -> None:
    original = (saved / file).read_bytes()
    try:
        (saved / file).write_bytes(content)
        check_model(TrainConfig(model=ModelConfig(name=str(saved), dtype="float32")))
    except ValueError as error:
        assert_one_line(error, "model.name")
    finally:
        (saved / file).write_bytes(original)


SIDES = st.integers(-1, 4) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 1.0, None])
PLACES = st.integers(-1, 12) | st.sampled_from([2**62, 2**64 - 1, 2**64, 0.0, None])
ENTRIES = st.builds(
    tensor,
    st.lists(SIDES, max_size=3),
    PLACES,
    PLACES,
    st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "F4", "C64", "BOOL", "X", ""]),
)


@given(
    header=st.dictionaries(ODD | st.sampled_from(["a", "__metadata__"]), ENTRIES | VALUES, max_size=3) | VALUES,
    size=st.none() | st.integers(0, 300) | st.sampled_from([2**31, 2**63, 2**64 - 1]),
)
@settings(max_examples=60)
@example(header={"a": tensor([2], 0, 8)}, size=None)
def test_any_header(header: Any, size: int | None, tmp_path: Path) -> None:
    """What is read has the shapes that the header says, and covers the file."""
    file = tmp_path / "w.safetensors"
    file.write_bytes(file_of(header, size))
    try:
        tensors = read_tensors(file)
    except ValueError as error:
        assert_one_line(error, "w.safetensors")
    else:
        assert sum(value.nbytes for value in tensors.values()) >= len(DATA) or size is not None
        packed = {name: header[name]["dtype"] for name in tensors if header[name]["dtype"] == "F4"}
        assert all(list(value.shape) == header[name]["shape"] for name, value in tensors.items() if name not in packed)


@pytest.fixture(scope="module")
def policy() -> Policy:
    unet = random_pipeline(TINY["sd15"], {"default": torch.float32}).unet
    policy = Policy(unet, Conditions(torch.ones(2, 7, 16), None, None), 1.0, rank=2, targets=("to_q", "to_k"))
    for master in policy.lora.masters:
        torch.nn.init.normal_(master)
    return policy


@pytest.fixture(scope="module")
def lora(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    run = tmp_path_factory.mktemp("run")
    save_policy(policy, run, torch.float32)
    return load_file(run / "lora" / LORA_FILE)


CHANGES = st.sampled_from(["drop", "rename", "shape", "type", "extra", "alpha", "scalar", "nothing"])


@pytest.mark.slow
@given(change=CHANGES, place=st.integers(0, 1000), name=ODD)
@settings(max_examples=10)
def test_any_lora(
    change: str,
    place: int,
    name: str,
    lora: dict[str, Tensor],
    policy: Policy,
    pipeline: DiffusionPipeline,
    tmp_path: Path,
) -> None:
    """As evaluations read it, which have the run's LoRA, and as samples do, which have plain diffusers."""
    key = sorted(lora)[place % len(lora)]
    changed = {
        "drop": lambda: {n: v for n, v in lora.items() if n != key},
        "rename": lambda: {name if n == key else n: v for n, v in lora.items()},
        "shape": lambda: lora | {key: lora[key][:1].contiguous()},
        "type": lambda: lora | {key: lora[key].to(torch.int32)},
        "extra": lambda: lora | {f"unet.{name}.lora_A.weight": torch.ones(4, 4)},
        "alpha": lambda: lora | {f"{key.rpartition('.lora_')[0]}.alpha": torch.tensor(1.0)},
        "scalar": lambda: lora | {key: torch.tensor(1.0)},
        "nothing": lambda: lora,
    }[change]()
    (tmp_path / "lora").mkdir(exist_ok=True)
    save_file(changed, tmp_path / "lora" / LORA_FILE)
    for load in (lambda: read_policy(policy, tmp_path), lambda: load_policy(pipeline, tmp_path)):
        try:
            load()
        except ValueError as error:
            assert_one_line(error, str(tmp_path))
            assert change != "nothing"
        else:
            assert change == "nothing"
    if change == "nothing":
        found = get_peft_model_state_dict(pipeline.unet, adapter_name=pipeline.get_active_adapters()[0])
        assert all(torch.equal(found[n.removeprefix("unet.")], weight) for n, weight in lora.items())
    pipeline.unload_lora_weights()
