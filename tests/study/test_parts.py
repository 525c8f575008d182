"""The samples that runs of a study share."""

from pathlib import Path

import pytest

from fastnabla.study.parts import end_part, pretrained_part, reference_part
from fastnabla.study.plan import Setting, final_runs
from fastnabla.study.protocol import Protocol
from fastnabla.study.samples import write_samples
from tests.study.made_up import TOML, made_samples, protocol_file


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        ('"sampler.steps" = "4"', '"sampler.steps" = "6"', False),
        ('"evaluation.prompts" = "2"', '"evaluation.prompts" = "1"', False),
        ('tracker = "none"', 'tracker = "none", "reward.terms" = "hue=1"', False),
        ('"optimizer.warmup" = "1"', '"optimizer.warmup" = "0"', True),
    ],
)
def test_samples_of_the_pretrained_model_count_for_its_settings_alone(old: str, new: str, kept: bool, tmp_path: Path):
    """Not those of another sampler, reward or number of prompts; how the runs are trained does not matter."""
    measured = []
    for text in (TOML, TOML.replace(old, new)):
        protocol = Protocol.read(protocol_file(tmp_path, text))
        run = final_runs(protocol, tmp_path / "study", [Setting("ours", 1e-3)])[0]
        shared = [pretrained_part(end_part(run, protocol), tmp_path), reference_part(run, protocol, tmp_path)]
        measured.append([part.is_measured for part in shared])
        for part in shared:
            write_samples(part.path, made_samples(part, 0), part.key)
    assert measured == [[False, False], [kept, kept]]
