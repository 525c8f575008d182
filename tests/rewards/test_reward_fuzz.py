"""Whatever is given as reward terms and weights: a reward of that meaning, or an error that names the field and the value."""

import math
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastnabla.rewards import REWARDS, build_reward, parse_term, parse_weights
from fastnabla.rewards.options import RewardOptions
from tests.config.test_config_fuzz import NUMBERS, ODD

NAMES = st.sampled_from(
    ["area", "hue", "os", "os:path", "os:getcwd", "math:", ":", "math:pi", "a.b:c", "..x:y", "json:tool.x"]
)
PARTS = (
    NAMES | st.sampled_from(["=", "=1", "=-0.5", "=nan", "=1e999", "=0", "=1_0", "= 2", "=٣"]) | ODD | NUMBERS.map(str)
)
TERMS = st.lists(PARTS, min_size=1, max_size=3).map("".join)


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Modules that cannot be imported."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "broken_reward.py").write_text("def reward(:")
    (folder / "raising_reward.py").write_text("\n1 / 0")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


@given(terms=st.lists(TERMS, max_size=3))
@settings(max_examples=60)
@example(terms=["os:getcwd"])
@example(terms=["a" * 10_000 + ":b"])
@example(terms=["broken_reward:reward"])
@example(terms=["raising_reward:reward"])
@example(terms=["..x:y"])
@example(terms=[":y"])
def test_any_terms(terms: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in REWARDS:
            patch.setitem(REWARDS, name, lambda device, options: len)
        try:
            reward = build_reward(terms)
        except ValueError as error:
            assert str(error).startswith(("reward.terms", "reward.weights")) and "\n" not in str(error)
            assert len(str(error)) < 1000
        else:
            weights = dict(map(parse_term, terms))
            assert {name: weight for name, (_, weight) in reward.terms.items()} == weights and len(weights) == len(
                terms
            )
            assert all(math.isfinite(weight) and weight for weight in weights.values())


@given(items=st.lists(ODD | st.tuples(ODD, ODD).map("=".join), max_size=3))
@settings(max_examples=40)
def test_any_weights(items: list[str]) -> None:
    try:
        weights = parse_weights(items)
    except ValueError as error:
        assert str(error).startswith("reward.weights")
        return
    assert [f"{name}={source}" for name, source in weights.items()] == items
    if items:
        with pytest.raises(ValueError, match=r"reward\.weights: .*belongs to no term"):
            build_reward(["area"], options=RewardOptions(weights=weights))
