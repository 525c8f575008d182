"""Finding, reading and loading weights: every mistake is named, nothing is unpickled."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastnabla.rewards import build_reward, parse_weights
from fastnabla.rewards.aesthetic import Aesthetic
from fastnabla.rewards.hpsv2 import HPSv2
from fastnabla.rewards.imagereward import ImageReward
from fastnabla.rewards.options import RewardOptions
from fastnabla.rewards.pickscore import PickScore
from fastnabla.rewards.weights import Source, find_files, load_weights, read_state_dict
from tests.golden_rewards import TINY, blip_configs, clip_config, golden

CPU = torch.device("cpu")
IMAGES = torch.rand(2, 3, 60, 50, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "cab at bat"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty-cache"))


def clip_vocabulary(folder: Path, tokens: int = 64) -> Path:
    """A CLIP vocabulary of letters and a merge."""
    letters = "abcdefghijklmnopqrstuvwxyz0123"
    vocab = [*letters, *(letter + "</w>" for letter in letters), "at</w>"]
    vocab += [f"<unused{i}>" for i in range(tokens - 2 - len(vocab))] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\na t</w>\n")
    return folder


def bert_vocabulary(folder: Path, tokens: int = 118) -> Path:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##a", "##b", "##t"]
    vocab += [f"[unused{i}]" for i in range(tokens - len(vocab))]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    return folder


def ids_of(path: Path, *tokens: str) -> list[int]:
    return [json.loads((path / "vocab.json").read_text())[token] for token in tokens]


def test_hpsv2_from_a_half_precision_checkpoint(tmp_path: Path) -> None:
    numbers = golden("hpsv2")
    half = {name: tensor.half() for name, tensor in numbers.state.items()}
    torch.save({"state_dict": half, "epoch": 3}, tmp_path / "HPS_v2.1_compressed.pt")
    folder = str(clip_vocabulary(tmp_path))
    options = RewardOptions(weights={"hpsv2": folder, "hpsv2.tokenizer": folder})
    reward = HPSv2.from_weights(CPU, options, config=clip_config(numbers.config))
    expected = ids_of(tmp_path, "<|startoftext|>", "c", "at</w>", "<|endoftext|>")
    assert reward.tokenize("a cat") == [expected[0], *ids_of(tmp_path, "a</w>"), *expected[1:]]
    assert len(reward.tokenize("a " * 50)) == 16 and reward.tokenize("a " * 50)[-1] == 63
    assert all(parameter.dtype == torch.float32 for parameter in reward.parameters())
    golden_reward = TINY["hpsv2"]()
    golden_reward.tokenize = reward.tokenize
    torch.testing.assert_close(reward(IMAGES, PROMPTS), golden_reward(IMAGES, PROMPTS), atol=5e-3, rtol=0)
    assert torch.equal(reward.encode_prompt("ﬁt"), reward.encode_prompt("fit"))


def test_imagereward_from_its_checkpoint(tmp_path: Path) -> None:
    numbers = golden("imagereward")
    state = numbers.state | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save(state, tmp_path / "any-name.pt")
    options = RewardOptions(
        weights={
            "imagereward": str(tmp_path / "any-name.pt"),
            "imagereward.tokenizer": str(bert_vocabulary(tmp_path) / "vocab.txt"),
        }
    )
    reward = ImageReward.from_weights(CPU, options, config=blip_configs(numbers.config))
    assert reward.tokenize("A cat") == [2, 5, 7, 31, 33, 3]  # [CLS] a c ##a ##t [SEP]
    assert len(reward.tokenize("a " * 50)) == 35
    golden_reward = TINY["imagereward"]()
    golden_reward.tokenize = reward.tokenize
    assert torch.equal(reward(IMAGES, PROMPTS), golden_reward(IMAGES, PROMPTS))


def aesthetic_options(folder: Path) -> RewardOptions:
    state = golden("aesthetic").state
    clip = {name.removeprefix("clip."): tensor for name, tensor in state.items() if name.startswith("clip.")}
    save_file(clip | {"vision_model.embeddings.position_ids": torch.arange(10)}, folder / "model.safetensors")
    head = {name.removeprefix("mlp."): tensor for name, tensor in state.items() if name.startswith("mlp.")}
    torch.save(head, folder / "aesthetic-model.pth")
    return RewardOptions(weights={"aesthetic": str(folder), "aesthetic.head": str(folder / "aesthetic-model.pth")})


def test_aesthetic_from_its_two_files(tmp_path: Path) -> None:
    options, tiny = aesthetic_options(tmp_path), TINY["aesthetic"]()
    reward = Aesthetic.from_weights(CPU, options, config=tiny.clip.config)
    assert torch.equal(reward(IMAGES, PROMPTS), tiny(IMAGES, PROMPTS))


def test_pickscore_from_safetensors(tmp_path: Path) -> None:
    numbers, tiny = golden("pickscore"), TINY["pickscore"]()
    save_file(numbers.state, tmp_path / "model.safetensors")
    folder = str(clip_vocabulary(tmp_path))
    options = RewardOptions(weights={"pickscore": folder, "pickscore.tokenizer": folder})
    reward = PickScore.from_weights(CPU, options, config=tiny.clip.config)
    tiny.tokenize = reward.tokenize
    assert torch.equal(reward(IMAGES, PROMPTS), tiny(IMAGES, PROMPTS))


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward 'aesthetic': .* with another shape: .* instead of \("):
        Aesthetic.from_weights(CPU, aesthetic_options(tmp_path), config=_wider())
    network = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'x': .*1 missing: bias.*2 unexpected: a, b"):
        load_weights("x", network, {"weight": torch.zeros(2, 2), "a": torch.zeros(1), "b": torch.zeros(1)})
    many = {f"k{i}": torch.zeros(1) for i in range(9)} | network.state_dict()
    with pytest.raises(ValueError, match=r"9 unexpected: k0, k1, k2, …"):
        load_weights("x", network, many)


def _wider():
    config = TINY["aesthetic"]().clip.config
    return type(config)(**(config.to_dict() | {"intermediate_size": 112}))


def test_a_wrong_vocabulary_is_refused(tmp_path: Path) -> None:
    numbers = golden("hpsv2")
    torch.save({"state_dict": numbers.state}, tmp_path / "HPS_v2.1_compressed.pt")
    folder = str(clip_vocabulary(tmp_path, tokens=70))
    options = RewardOptions(weights={"hpsv2": folder, "hpsv2.tokenizer": folder})
    with pytest.raises(ValueError, match=r"70 tokens.*the text tower 64"):
        HPSv2.from_weights(CPU, options, config=clip_config(numbers.config))
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="not a CLIP vocabulary"):
        HPSv2.from_weights(CPU, options, config=clip_config(numbers.config))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("aesthetic", "hf download openai/clip-vit-large-patch14 model.safetensors"),
        ("clipscore", "hf download openai/clip-vit-large-patch14 model.safetensors"),
        ("hpsv2", "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"),
        ("imagereward", "hf download THUDM/ImageReward ImageReward.pt"),
        ("pickscore", "hf download yuvalkirstain/PickScore_v1 model.safetensors"),
    ],
)
def test_offline_the_command_is_named(name: str, command: str) -> None:
    with pytest.raises(ValueError, match=f"reward '{name}': .*{command} .*weights: {name}=PATH"):
        build_reward([name])


def test_a_folder_without_the_file_and_what_is_no_source(tmp_path: Path) -> None:
    source = Source("xswu/HPSv2", ("HPS_v2.1_compressed.pt",))
    with pytest.raises(ValueError, match=f"has no HPS_v2.1_compressed.pt.*hf download.*--local-dir {tmp_path}"):
        find_files("hpsv2", source, str(tmp_path))
    for wrong in ("./no/such/folder", "foo--bar/x", "a/b/c", "../x", "x/"):
        with pytest.raises(
            ValueError, match=rf"^weights: hpsv2={wrong} is neither .* nor a hub id; give hpsv2=PATH or"
        ):
            find_files("hpsv2", source, wrong)
    with pytest.raises(ValueError, match=r"hf download mine/copy HPS"):
        find_files("hpsv2", source, "mine/copy")
    (tmp_path / "a.json").touch()
    with pytest.raises(ValueError, match=r"is a file; give the folder that contains vocab.json, merges.txt"):
        find_files("t", Source("r", ("vocab.json", "merges.txt")), str(tmp_path / "a.json"))


def test_a_source_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pt").touch()
    for source in ("~", "~/w.pt"):
        assert find_files("hpsv2", Source("xswu/HPSv2", ("w.pt",)), source) == [tmp_path / "w.pt"]


def test_cached_files_are_taken_without_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "empty-cache" / "models--xswu--HPSv2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "w.pt").touch()
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    assert find_files("hpsv2", Source("xswu/HPSv2", ("w.pt",)), None) == [snapshot / "w.pt"]


class Evil:
    def __reduce__(self):
        return math.sqrt, (4.0,)


def test_nothing_is_unpickled_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"weight": Evil()}, path)
    with pytest.raises(ValueError, match=r"'x': .*w.pt cannot be read"):
        read_state_dict("x", path)
    torch.save({"weight": torch.zeros(100, 100)}, path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"cannot be read.*Is the download complete"):
        read_state_dict("x", path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        read_state_dict("x", path)
    tensors = tmp_path / "w.safetensors"
    save_file({"weight": torch.zeros(100, 100)}, tensors)
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        read_state_dict("x", tensors)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"reward.preprocess = 'none'"):
        RewardOptions(preprocess="none")
    assert parse_weights(["hpsv2=a/b", "x.y=c=d"]) == {"hpsv2": "a/b", "x.y": "c=d"}
    for items, message in ((["hpsv2"], "not of the form"), (["=a"], "not of the form"), (["a=b", "a=c"], "twice")):
        with pytest.raises(ValueError, match=message):
            parse_weights(items)
    with pytest.raises(ValueError, match="'hpsv2' belongs to no term"):
        build_reward(["area"], options=RewardOptions(weights={"hpsv2": "x"}))
    with pytest.raises(ValueError, match=r"unknown part 'hpsv2.vocab'; the parts are hpsv2, hpsv2.tokenizer"):
        build_reward(["hpsv2"], options=RewardOptions(weights={"hpsv2.vocab": "x"}))
