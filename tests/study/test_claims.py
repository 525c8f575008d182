"""Claims and the page, from results that are made up."""

from pathlib import Path

import pytest

from fastnabla.study.claims import comparisons
from fastnabla.study.page import write_page
from fastnabla.study.protocol import Protocol
from tests.study.made_up import TOML, protocol_file, results

SIX = TOML.replace("seeds = [0]", "seeds = [0, 1, 2, 3, 4, 5]")
KEPT, LOST = [0.10, 0.11, 0.12, 0.10, 0.11, 0.13], [0.40, 0.42, 0.44, 0.41, 0.45, 0.43]


@pytest.fixture
def protocol(tmp_path: Path) -> Protocol:
    return Protocol.read(protocol_file(tmp_path, SIX))


def test_methods_are_compared_at_equal_gain_by_seed(protocol: Protocol):
    found = comparisons(results(protocol, {"ours": KEPT, "theirs": LOST}))
    assert [(each.other, each.measure, each.verdict) for each in found] == [
        ("theirs", "hue_entropy", "better"),
        ("theirs", "kernel_distance", "better"),
    ]
    expected = sum(lost - kept for kept, lost in zip(KEPT, LOST, strict=True)) / 6 / 2  # at half the scale
    assert found[0].difference.mean == pytest.approx(expected)
    assert found[1].difference.mean == pytest.approx(-expected)
    assert found[0].difference.low < expected < found[0].difference.high


def test_the_same_differences_reversed_are_worse(protocol: Protocol):
    found = comparisons(results(protocol, {"ours": LOST, "theirs": KEPT}))
    assert [each.verdict for each in found] == ["worse", "worse"]


def test_differences_within_the_spread_are_not_resolved(protocol: Protocol):
    found = comparisons(results(protocol, {"ours": KEPT, "theirs": KEPT[::-1]}))
    assert [each.verdict for each in found] == ["not resolved", "not resolved"]


def test_one_seed_resolves_nothing(protocol: Protocol):
    found = comparisons(results(protocol, {"ours": KEPT[:1], "theirs": LOST[:1]}))
    assert [each.verdict for each in found] == ["not resolved", "not resolved"]


def test_a_method_that_gains_too_little_is_not_compared(protocol: Protocol):
    assert comparisons(results(protocol, {"ours": KEPT, "theirs": LOST}, gain=0.3)) == []


def test_the_page_says_what_the_results_are(tmp_path: Path, protocol: Protocol):
    page, picture = write_page(results(protocol, {"ours": KEPT, "theirs": LOST}), tmp_path / "made-up.toml")
    text = page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert text.index("## Protocol") < text.index("## ours at equal reward") < text.index("## At the end of training")
    assert "- `ours` is better than theirs in hue_entropy." in text
    assert "| theirs | hue entropy, share of its ceiling | 6 | +0.157 |" in text
    assert f"![fronts]({picture.name})" in text
    assert all(
        line.count("|") == text.splitlines()[n - 1].count("|")
        for n, line in enumerate(text.splitlines())
        if line.startswith("| ---")
    )


def test_nothing_is_written_without_results(tmp_path: Path, protocol: Protocol):
    with pytest.raises(ValueError, match="no final run has been measured yet"):
        write_page(results(protocol, {}), tmp_path / "made-up.toml")
    assert not (tmp_path / "made-up.md").exists()
