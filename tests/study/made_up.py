"""Protocols, samples and results that no network was run for."""

import json
import math
import zlib
from pathlib import Path

import torch

from fastnabla.comparison.plan import LAST_FILE, PlannedRun
from fastnabla.config.train import to_json
from fastnabla.metrics.measures import Measures
from fastnabla.study.choice import tuned
from fastnabla.study.fronts import Place
from fastnabla.study.measures import MEASURES
from fastnabla.study.measuring import DIVERGENCE_FILE
from fastnabla.study.parts import MEASURED, Part, own_parts, shared_parts
from fastnabla.study.plan import Setting, StudyRun
from fastnabla.study.protocol import Protocol
from fastnabla.study.records import RunResult, Spent
from fastnabla.study.results import Results
from fastnabla.study.samples import Samples, write_samples

TOML = """
preset = "testbed"
passes = 88.0
settings = { "sampler.steps" = "4", "rollout.trajectories" = "2", "rollout.fraction" = "0.5", "evaluation.prompts" = "2", \
"evaluation.samples" = "2", "optimizer.warmup" = "1", tracker = "none" }

[tuning]
seeds = [7]
samples = 2

[final]
seeds = [0]
allowed_losses = [0.2]

[measurement]
samples = 4
reference_samples = 4
scales = [0.5]
scale_samples = 2
held_out = "HELD_OUT"
held_out_samples = 2
divergence_samples = 2

[claims]
method = "ours"
gain = 0.5
measures = ["hue_entropy", "kernel_distance"]

[[methods]]
name = "ours"
method = "residual-db"
learning_rates = [1e-3, 1e-2]
settings = { "flow.kind" = "none" }
note = "a <note>"

[[methods]]
name = "theirs"
method = "draft"
learning_rates = [3e-3]
"""


def protocol_file(folder: Path, text: str = TOML) -> Path:
    """Write the protocol `text` and its held-out prompts into `folder`."""
    prompts = folder / "held-out.txt"
    prompts.write_text("a giraffe\na picture of a horse\n")
    path = folder / "made-up.toml"
    path.write_text(text.replace("HELD_OUT", str(prompts)))
    return path


def path_of(gain: float, loss: float) -> list[Place]:
    """A path that gains and loses linearly in the scale."""

    def place(scale: float) -> Place:
        change = {"reward": gain * scale, "hue_entropy": -loss * scale, "kernel_distance": loss * scale}
        return Place(scale, dict.fromkeys(MEASURES, 1.0) | {n: 1 + value for n, value in change.items()})

    return [place(scale) for scale in (0.0, 0.5, 1.0, 1.5)]


def run_result(setting: Setting, seed: int, gain: float, loss: float) -> RunResult:
    path = path_of(gain, loss)
    return RunResult(
        setting=setting,
        seed=seed,
        pretrained=path[0].measures,
        end=path[2].measures,
        path=path,
        held_out={"reward": gain, "hue_entropy": -loss, "accuracy": 0.0},
        divergence=3.0,
        spent=Spent(updates=2, passes=76.0, decodes=4.0, seconds=1.0),
    )


def results(protocol: Protocol, losses: dict[str, list[float]], gain: float = 1.0) -> Results:
    """Results of one setting a method, whose seeds lose `losses` of hue entropy at scale 1."""
    rates = {method.name: method.learning_rates[0] for method in protocol.methods}
    settings = {name: Setting(name, rates[name]) for name in losses}
    return Results(
        protocol=protocol,
        tuned={name: [tuned(settings[name], [(gain, math.fsum(own) / len(own))])] for name, own in losses.items()},
        settings={setting: ["20%"] for setting in settings.values()},
        runs=[run_result(settings[n], seed, gain, loss) for n, own in losses.items() for seed, loss in enumerate(own)],
        remarks=[],
    )


def made_samples(part: Part, shift: float) -> Samples:
    """Random samples of two prompts. The reward rises by about `shift` times the part's scale."""
    drawn = torch.Generator().manual_seed(zlib.crc32(f"{part.path.stem} {part.seed} {part.noise}".encode()))
    count = 2 * part.samples

    def numbers(*size: int) -> torch.Tensor:
        return torch.rand(count, *size, generator=drawn, dtype=torch.float64)

    reward = numbers() / 10 + shift * part.scale
    measures = Measures(
        prompt=torch.arange(2).repeat_interleave(part.samples),
        reward=reward,
        total=reward.clone(),
        parts={},
        hue=numbers(),
        dark=numbers().round(),
        features=numbers(3).float().double(),
        pixels=numbers(3).float().double(),
    )
    return Samples(measures=measures, correct=numbers().round())


def train(run: PlannedRun) -> None:
    """Make up the folder of a finished run."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(to_json(run.config))
    (run.folder / "timing.jsonl").write_text("")
    point = {"phase": "evaluate", "update": run.config.updates}
    (run.folder / "metrics.jsonl").write_text(f"{json.dumps(point)}\n")
    (run.folder / LAST_FILE).write_text("")


def measure(run: StudyRun, protocol: Protocol, folder: Path, shift: float = 0.7) -> None:
    """Make up all samples of a run and of the pretrained model that stands beside it."""
    for part in (*own_parts(run, protocol), *shared_parts(run, protocol, folder)):
        write_samples(part.path, made_samples(part, shift), part.key)
    if run.is_final:
        (run.folder / MEASURED / DIVERGENCE_FILE).write_text('{"without_last_two": 2.0}\n')
