"""Claims and the page, from results that are made up."""

import dataclasses
import math
from pathlib import Path

import pytest

from fastnabla.study.claims import comparisons
from fastnabla.study.page import write_page
from fastnabla.study.plan import Setting
from fastnabla.study.protocol import Protocol
from tests.study.made_up import TOML, protocol_file, results, run_result

THIRD = """
[[methods]]
name = "third"
method = "refl"
learning_rates = [1e-3]
"""
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


@pytest.mark.parametrize("seeds", [1, 5])
def test_before_the_last_seed_nothing_is_tested(seeds: int, protocol: Protocol):
    found = comparisons(results(protocol, {"ours": KEPT, "theirs": LOST[:seeds]}))
    assert [(each.verdict, each.difference.n) for each in found] == [("not tested", seeds)] * 2
    assert all(math.isnan(each.adjusted) for each in found)


def test_nothing_is_tested_if_a_seed_does_not_reach_the_gain(protocol: Protocol):
    made = results(protocol, {"ours": KEPT, "theirs": LOST})
    weak = run_result(made.runs[-1].setting, 5, gain=0.3, loss=0.43)
    found = comparisons(dataclasses.replace(made, runs=[*made.runs[:-1], weak]))
    assert [(each.verdict, each.difference.n) for each in found] == [("not tested", 5)] * 2


def test_a_method_that_gains_too_little_is_not_compared(protocol: Protocol):
    assert comparisons(results(protocol, {"ours": KEPT, "theirs": LOST}, gain=0.3)) == []


def test_the_family_is_that_of_the_protocol(tmp_path: Path, protocol: Protocol):
    """Comparisons that are not made count as if their p-values were 1."""
    first, _ = comparisons(results(protocol, {"ours": KEPT, "theirs": LOST}))
    assert first.adjusted == pytest.approx(2 * first.difference.p)
    larger = Protocol.read(protocol_file(tmp_path, SIX + THIRD))
    first, _ = comparisons(results(larger, {"ours": KEPT, "theirs": LOST}))
    assert first.adjusted == pytest.approx(4 * first.difference.p)


def test_of_a_methods_settings_the_one_with_most_seeds_and_then_the_scale_nearest_to_1_counts(protocol: Protocol):
    few, weak, strong = (Setting("ours", rate) for rate in (1e-3, 3e-3, 1e-2))
    runs = [run_result(few, seed, gain=gain, loss=0.1) for seed, gain in enumerate([0.5, 0.1])]  # at scale 1, or never
    runs += [run_result(weak, seed, gain=0.4, loss=0.1) for seed in (0, 1)]  # at scale 1.25
    runs += [run_result(strong, seed, gain=1.0, loss=0.1) for seed in (0, 1)]  # at scale 0.5
    settings: dict[Setting, list[str]] = {setting: ["20%"] for setting in (few, strong, weak)}
    made = dataclasses.replace(results(protocol, {"ours": KEPT}), settings=settings, runs=runs)
    found = made.at_gain("ours", 0.5)
    assert found.setting == weak and found.places.keys() == {0, 1} and not found.is_complete
    assert [place.scale for place in found.places.values()] == pytest.approx([1.25, 1.25])


def test_a_setting_does_not_count_because_more_of_its_seeds_have_been_run(protocol: Protocol):
    early, late = Setting("ours", 1e-3), Setting("ours", 1e-2)
    runs = [run_result(early, seed, gain=0.35, loss=0.1) for seed in range(3)]  # at scale 1.43
    runs += [run_result(late, seed, gain=0.75, loss=0.1) for seed in (0, 1)]  # at scale 0.67
    settings = {early: ["5%"], late: ["20%"]}
    made = dataclasses.replace(results(protocol, {"ours": KEPT}), settings=settings, runs=runs)
    assert made.at_gain("ours", 0.5).setting == late


def test_a_measure_that_the_probe_lacks_is_named(protocol: Protocol):
    made = results(protocol, {"ours": KEPT, "theirs": LOST})
    for run in made.runs:
        del run.end["kernel_distance"]
    with pytest.raises(
        ValueError, match=r"claims\.measures = 'kernel_distance': evaluation.probe cannot measure it; choose"
    ):
        comparisons(made)


def test_the_page_says_why_a_method_is_not_compared(tmp_path: Path):
    protocol = Protocol.read(protocol_file(tmp_path, SIX + THIRD))
    made = results(protocol, {"ours": KEPT, "theirs": LOST})
    weak = [run_result(Setting("theirs", 3e-3), seed, gain=0.3, loss=0.1) for seed in range(6)]

    def page(names: list[str], weak_theirs: bool) -> str:
        runs = [run for run in made.runs if run.setting.name in names] + (weak if weak_theirs else [])
        return write_page(dataclasses.replace(made, runs=runs), tmp_path / "made-up.toml")[0].read_text()

    text = page(["ours"], weak_theirs=True)
    assert "because they do not gain 0.5 with a seed in common: theirs." in text
    assert "because they have no results: third." in text
    assert "- Nothing is compared, because `ours` has no results or" in page(["theirs"], weak_theirs=False)


def test_the_page_says_what_the_results_are(tmp_path: Path, protocol: Protocol):
    page, *pictures = write_page(results(protocol, {"ours": KEPT, "theirs": LOST}), tmp_path / "made-up.toml")
    text = page.read_text()
    assert [picture.name for picture in pictures] == ["made-up-hue_entropy.png", "made-up-kernel_distance.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert text.index("## Protocol") < text.index("## ours at equal reward") < text.index("## At the end of training")
    assert "- `ours` is better than theirs in: hue entropy, share of its ceiling." in text
    assert "| theirs | hue entropy, share of its ceiling | 6 of 6 | 0.50 / 0.50 | +0.157 |" in text
    assert all(f"![fronts]({picture.name})" in text for picture in pictures)
    assert all(
        line.count("|") == text.splitlines()[n - 1].count("|")
        for n, line in enumerate(text.splitlines())
        if line.startswith("| ---")
    )


def test_what_is_not_finite_is_printed_as_such(tmp_path: Path, protocol: Protocol):
    made = results(protocol, {"ours": KEPT, "theirs": LOST})
    for run in made.runs:
        if run.setting.name == "theirs":
            run.end["frechet"] = math.nan
    text = write_page(made, tmp_path / "made-up.toml")[0].read_text()
    end = text[text.index("## At the end of training") : text.index("## Tuning")]
    theirs, ours = (
        next(line for line in end.splitlines() if line.startswith(f"| {name},")) for name in ("theirs", "ours")
    )
    assert theirs.count("+nan [+nan, +nan]") == 1 and "nan" not in ours


@pytest.mark.parametrize(("settings", "words"), [({"tracker": "none"}, " with `tracker=none`"), ({}, "")])
def test_the_page_names_the_settings_there_are(settings: dict, words: str, tmp_path: Path, protocol: Protocol):
    protocol = dataclasses.replace(protocol, settings=settings)
    page, *_ = write_page(results(protocol, {"ours": KEPT}), tmp_path / "made-up.toml")
    assert f"- All runs start from the preset `testbed`{words}, and spend at most 88 U.\n" in page.read_text()


def test_nothing_is_written_without_results(tmp_path: Path, protocol: Protocol):
    with pytest.raises(ValueError, match="no final run has been measured yet"):
        write_page(results(protocol, {}), tmp_path / "made-up.toml")
    assert not (tmp_path / "made-up.md").exists()
