"""How near quantised weights keep the testbed's gradients to those of its own weights."""

import dataclasses

import pytest

from bench.quantised_gradients import ROWS, compare
from fastnabla.config.presets import PRESETS


@pytest.mark.slow
def test_the_testbed_s_gradients() -> None:
    """Eight trajectories have errors of 0.001 (int8) and 0.02 (nf4), and cosines of the LoRA's gradients of at least 0.995 and
    0.987. Here there are two, of whose few states one can have a far larger part."""
    preset = PRESETS["testbed"][1]
    found = compare(dataclasses.replace(preset, rollout=dataclasses.replace(preset.rollout, trajectories=2)))
    limits = {"int8": (0.005, 0.99), "nf4": (0.06, 0.9)}
    assert found.keys() == limits.keys()
    for kind, (error, cosine) in limits.items():
        for label, name, _ in ROWS:
            value = found[kind][label]
            if "error" in label:
                assert 0 < value < error, (kind, label, value)
            elif name != "score":
                assert cosine < value, (kind, label, value)
        median, lowest = (found[kind][label] for label, name, _ in ROWS if name == "score")
        assert lowest <= median and cosine < median
