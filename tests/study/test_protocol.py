"""Protocols: what a file may say, and what is refused."""

from pathlib import Path

import pytest

from fastnabla.study.measuring import measured_prompts
from fastnabla.study.plan import run_config
from fastnabla.study.protocol import Protocol
from fastnabla.training.build import plan_and_build
from tests.study.made_up import TOML, protocol_file

ROOT = Path(__file__).parents[2]


def test_the_published_protocol_is_valid():
    protocol = Protocol.read(ROOT / "docs/results/comparison.toml")
    assert {len(method.learning_rates) for method in protocol.methods} == {4}
    for method in protocol.methods:
        low, *_, high = method.learning_rates
        assert high / low == pytest.approx(30, rel=0.15), "four learning rates a factor of 3 apart"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["comparison", "ablations"])
def test_every_run_of_a_published_protocol_is_built(name: str) -> None:
    protocol = Protocol.read(ROOT / f"docs/results/{name}.toml")
    for method in protocol.methods:
        config = run_config(protocol, method, method.learning_rates[0])
        plan_and_build(config, measured_prompts(config, protocol.measurement.held_out))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("passes = 88.0", "passes = -1", "passes = -1.0: must be positive"),
        ("passes = 88.0", 'passes = "many"', "passes = 'many': must be of type float"),
        ("passes = 88.0", "", "passes: is missing"),
        ('preset = "testbed"', 'preset = "sd9"', "preset = 'sd9': must be one of testbed"),
        ("seeds = [7]", "seeds = [0]", "final.seeds = [0]: are tuning seeds too"),
        ("seeds = [0]", "seeds = [1, 1]", "final.seeds = [1, 1]: each value may be given only once"),
        ("seeds = [0]", "seeds = []", "final.seeds = []: must be a list that is not empty"),
        ("seeds = [0]", "seeds = [true]", "final.seeds = True: must be of type int"),
        ("allowed_losses = [0.2]", "allowed_losses = [20]", "final.allowed_losses = 20.0: each must be a share"),
        ("scales = [0.5]", "scales = [1]", "measurement.scales = 1.0: each must be positive, finite and not 1"),
        ("scale_samples = 2", "scale_samples = 5", "measurement.scale_samples = 5: must be at most measurement.samples"),
        ('method = "ours"', 'method = "mine"', "claims.method = 'mine': must be one of ours, theirs"),
        ('method = "draft"', 'method = "sketch"', "methods: 'theirs': method = 'sketch': must be one of residual-db"),
        ('name = "theirs"', 'name = "a/b"', "methods.name = 'a/b': use lower-case letters"),
        ('name = "theirs"', 'nam = "theirs"', "methods.nam: there is no such name; the names are name, method"),
        ('"flow.kind" = "none"', '"flow.kind" = 3', 'must be a table of strings'),
        ('measures = ["hue_entropy", "kernel_distance"]', 'measures = ["beauty"]', "claims.measures = 'beauty': must be one of"),
        ("[claims]", "[claims", "cannot be read as a protocol"),
    ],
)  # fmt: skip
def test_bad_values_are_named(tmp_path: Path, old: str, new: str, message: str):
    assert old in TOML
    with pytest.raises(ValueError) as caught:
        Protocol.read(protocol_file(tmp_path, TOML.replace(old, new, 1)))
    assert message in str(caught.value) and "made-up.toml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.toml"):
        Protocol.read(tmp_path / "none.toml")
