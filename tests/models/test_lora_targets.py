"""`lora.targets`: every entry matches a layer, or the error says what to write. The saved LoRA loads in plain diffusers."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file
from torch import nn

from fastnabla import train
from fastnabla.config.model_sections import LORA_TARGETS, LoraConfig, ModelConfig
from fastnabla.models.conditions import Conditions
from fastnabla.models.lora import ADAPTER, add_lora
from fastnabla.models.lora_targets import check_targets, target_layers
from fastnabla.models.policy import Policy
from fastnabla.models.saved_policy import read_policy, save_policy
from fastnabla.training import command
from tests.families import TINY, save_tiny

TESTBED = ModelConfig(name="testbed")


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY["sd15"].network).requires_grad_(False)


UNET = tiny_unet()


def names(pattern: str) -> list[str]:
    return [n for n, m in UNET.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and re.fullmatch(pattern, n)]


@pytest.mark.parametrize(
    ("targets", "pattern"),
    [
        (LORA_TARGETS, r".*\.to_(q|k|v|out\.0)"),
        (("attn2.to_q",), r".*\.attn2\.to_q"),
        (("conv_in",), r"conv_in"),
        (("conv_in", "to_k", "conv_in"), r"conv_in|.*\.to_k"),
        (("regex:.*attn2.*",), r".*\.attn2\..*"),
        ((r"regex:down_blocks\.\d.*attn1\.to_[qk]", "conv1"), r"down_blocks\..*attn1\.to_(q|k)|.*\.conv1"),
        (("all-linear",), r".*(to_[qkv]|to_out\.0|ff\.net\..*|time_emb_proj|linear_[12])"),
        (tuple(names(r".*attn1\.to_v")), r".*attn1\.to_v"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_layers_of_targets(targets: tuple[str, ...], pattern: str) -> None:
    assert target_layers(UNET, targets) == names(pattern) != []


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("to_query",), r"'to_query' matches no layer; similar names: to_q"),
        (("to_q", "to_valeu"), r"'to_valeu' .*similar names: to_v; 'to_q' matches 8 layers"),
        (("to_k_lora",), r"similar names: to_k\."),
        (("TO_Q",), r"similar names: to_q,"),
        (("attn.to_q",), r"similar names: attn2\.to_q, attn1\.to_q"),
        (("unet.conv_in",), r"similar names: conv_in"),
        (("all_linear",), r"similar names: all-linear"),
        (("to_valeu", "to_qeury"), r"'to_valeu' .*to_v; 'to_qeury' .*to_q"),
        ((".*attn2.*to_q",), r"write regex:\.\*attn2\.\*to_q;"),
        (("*.to_q",), r"write regex:\.\*\.to_q;"),
        (("attn*.to_k",), r"write regex:\.\*attn\.\*\.to_k;"),
        (("attn1|attn2",), r"write regex:\.\*\(attn1\|attn2\)\.\*"),
        (("^to_q$",), r"write regex:\.\*to_q;"),
        (("regex:to_q",), r"write regex:\.\*to_q;"),
        (("regex:(to_q", "to_k"), r"not a regular expression \(missing \).*'to_k' matches 8 layers"),
        (("to_q,to_k",), r"separate the names by blanks: to_q to_k"),
        (("attn2",), r"of type Attention, which cannot have a LoRA; for the layers in it write regex:\(\.\*\\\.\)\?attn2\\\.\.\*"),
        (("norm1", "to_q"), r"norm1, of type (Layer|Group)Norm, which cannot have a LoRA; 'to_q'"),
        (("",), r"'' matches no layer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_an_entry_without_a_layer_is_refused_with_what_to_write(targets: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^lora\.targets = .*{said}.*Give names of") as error:
        target_layers(UNET, targets)
    for written in re.findall(r"write (regex:\S*?)[;.]? ", str(error.value)):
        assert target_layers(UNET, (written,)), written
    for similar in re.findall(r"similar names: ([\w., -]*\w)[;.]", str(error.value)):
        assert target_layers(UNET, similar.split(", "))


def test_no_entry_at_all() -> None:
    with pytest.raises(ValueError, match=r"lora\.targets = \(\): names no layer; give at least one, such as to_q"):
        LoraConfig(targets=())
    assert LoraConfig(rank=0, targets=()).targets == ()


def test_the_configuration_files_are_enough() -> None:
    check_targets(TESTBED, LoraConfig(targets=("conv_in", "regex:.*attn2.*")))
    check_targets(TESTBED, LoraConfig(rank=0, targets=("nothing",)))
    with pytest.raises(ValueError, match="similar names: to_v"):
        check_targets(TESTBED, LoraConfig(targets=("to_valeu",)))


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_run_is_refused_before_anything_is_loaded(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "build_components", None)
    monkeypatch.chdir(tmp_path)
    assert train.main(["testbed", "--lora.targets", "to_q", "to_valeu", *more]) == 2
    assert "'to_valeu' matches no layer; similar names: to_v; 'to_q' matches" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("conv1", "to_q")], ids=["default", "convolutions"])
def test_weights_are_those_of_pefts_own_list(targets: tuple[str, ...]) -> None:
    """To the bit: the same layers, initialised in the same order."""
    ours, theirs = tiny_unet(), tiny_unet()
    torch.manual_seed(1)
    add_lora(ours, 4, targets)
    torch.manual_seed(1)
    theirs.add_adapter(
        PeftConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=list(targets)), ADAPTER
    )
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets", [("regex:.*attn2.to_[kv]",), ("conv_in", "conv1", "attn1.to_q")], ids=["pattern", "convolutions"]
)
def test_a_saved_lora_loads_in_plain_diffusers(targets: tuple[str, ...], tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(save_tiny("sd15", tmp_path))
    text = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))
    x, time, prompt = torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.tensor([0])

    def policy() -> Policy:
        unet = UNet2DConditionModel.from_pretrained(tmp_path / "sd15" / "unet")
        return Policy(unet, Conditions(text, None, None), 1.0, rank=2, targets=targets)

    trained = policy()
    for master in trained.lora.masters:
        nn.init.normal_(master, std=0.2)
    save_policy(trained, tmp_path, torch.float32)
    layers = {name.removeprefix("unet.").split(".lora_")[0] for name in load_file(next((tmp_path / "lora").iterdir()))}
    assert layers == set(target_layers(UNET, targets))

    with torch.no_grad():
        expected = trained(x, time, prompt)
        plain = pipeline.unet(x, time, text[1:]).sample
        assert (expected - plain).abs().max() > 1e-3
        pipeline.load_lora_weights(tmp_path / "lora")
        torch.testing.assert_close(pipeline.unet(x, time, text[1:]).sample, expected, rtol=0, atol=1e-5)
        again = policy()
        read_policy(again, tmp_path)
        assert torch.equal(again(x, time, prompt), expected)
