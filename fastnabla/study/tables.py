"""The tables of a study."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from fastnabla.comparison.sheet import Sheet
from fastnabla.study.choice import Tuned, is_at_the_edge
from fastnabla.study.claims import Comparison, family_size
from fastnabla.study.measures import MEASURES
from fastnabla.study.plan import Setting
from fastnabla.study.protocol import Protocol
from fastnabla.study.records import RunResult
from fastnabla.study.results import Results
from fastnabla.study.statistics import paired

END = tuple(name for name in MEASURES if name != "reward")
"""Measures at the end of training, besides the reward."""


def method_sheet(protocol: Protocol) -> Sheet:
    """The methods, their settings and the learning rates that are tried."""
    rows = [
        [
            method.name,
            ", ".join(f"`{field}={value}`" for field, value in method.settings.items()) or "the preset's",
            ", ".join(f"{rate:g}" for rate in method.learning_rates),
            method.note,
        ]
        for method in protocol.methods
    ]
    return Sheet("The methods", ["method", "settings", "learning rates", "what it is"], rows, texts=4)


def tuning_sheet(results: Results) -> Sheet:
    """Gain and loss of each learning rate, with the chosen ones in bold."""
    rates = sorted({rate for method in results.protocol.methods for rate in method.learning_rates})
    rows = []
    for name, own in results.tuned.items():
        cells = {
            each.setting: f"{each.gain:+.2f} / {-each.loss:+.3f} ({len(each.losses)}){_diverged(each)}" for each in own
        }
        texts = {s: f"**{text}**" if s in results.settings else text for s, text in cells.items()}
        tried = next(method.learning_rates for method in results.protocol.methods if method.name == name)
        rows.append([name, *(texts.get(Setting(name, rate), "–" if rate in tried else "") for rate in rates)])
    samples = results.protocol.tuning.samples
    title = (
        f"Tuning, {samples} samples a prompt: change of the reward / of hue entropy, means over seeds (their number); chosen "
        "learning rates in bold; – is no result"
    )
    return Sheet(title, ["method", *(f"{rate:g}" for rate in rates)], rows)


def claim_sheet(found: Sequence[Comparison], results: Results) -> Sheet:
    """The comparisons of the claims, with their intervals."""
    claims, family = results.protocol.claims, family_size(results.protocol)
    rows = [
        [
            each.other,
            MEASURES[each.measure].label,
            _share(each.difference.n, results),
            " / ".join(f"{scale:.2f}" for scale in each.scales),
            f"{each.difference.mean:+.3g}",
            "" if each.difference.n == 1 else f"[{each.difference.low:+.3g}, {each.difference.high:+.3g}]",
            "" if each.difference.n == 1 else f"{each.difference.needed(family):.3g}",
            "" if math.isnan(each.adjusted) else f"{each.adjusted:.2g}",
            each.verdict,
        ]
        for each in found
    ]
    title = f"{claims.method} against each other method where both have gained {claims.gain:g}"
    columns = ["against", "measure", "seeds", "scales", "difference", "95 % interval", "needed", "adjusted p"]
    return Sheet(title, [*columns, f"{claims.method} is"], rows, texts=2)


def gain_sheet(results: Results, gain: float) -> Sheet:
    """All methods at equal gain of the reward: paired changes from the pretrained model, means with [lowest, highest]."""
    names = [name for name in END if all(name in run.end for run in results.runs)]
    first = {run.seed: run.path[0].measures for run in results.runs}
    rows = [["pretrained", str(len(first)), "0", *(_cell([own[name] for own in first.values()]) for name in names)]]
    for method in results.protocol.methods:
        found = results.at_gain(method.name, gain)
        if found is not None:
            scale = _cell([place.scale for place in found.places.values()])
            changes = [
                [place.measures[name] - first[seed][name] for seed, place in found.places.items()] for name in names
            ]
            rows.append(
                [str(found.setting), _share(len(found.places), results), scale, *(_cell(own, "+") for own in changes)]
            )
    samples = results.protocol.measurement.scale_samples
    title = (
        f"Changes where the reward has gained {gain:g}, by the scale of the LoRA, with {samples} samples a prompt; the first row has "
        "the pretrained model's values"
    )
    return Sheet(title, ["setting", "seeds", "scale", *(MEASURES[name].label for name in names)], rows)


def end_sheet(results: Results) -> Sheet:
    """Every setting at the end of training: the pretrained model's values, and paired changes from them with intervals."""
    names = ["reward", *(name for name in END if all(name in run.end for run in results.runs))]
    first = _by_seed(results)
    rows = [
        ["pretrained", "", str(len(first)), *(_cell([run.pretrained[name] for run in first]) for name in names), "0"]
    ]
    for setting, reasons in results.settings.items():
        runs = list(results.of(setting).values())
        if runs:
            cells = [_interval([run.end[name] - run.pretrained[name] for run in runs]) for name in names]
            edge = "" if not _is_edge(results, setting) else " (edge)"
            seeds, divergence = _share(len(runs), results), _interval([run.divergence for run in runs])
            rows.append([f"{setting}{edge}", ", ".join(reasons), seeds, *cells, divergence])
    labels = [MEASURES[name].label for name in names]
    samples = results.protocol.measurement.samples
    title = (
        f"At the end of training, {samples} samples a prompt: changes from the pretrained model, with 95 % intervals; the first row "
        "has the pretrained model's values"
    )
    columns = ["setting", "chosen for", "seeds", *labels, "KL along trajectories without the last two steps, nats"]
    return Sheet(title, columns, rows, texts=2)


def held_out_sheet(results: Results) -> Sheet:
    """Changes on prompts that no run was trained on."""
    names = {"reward": "reward", "hue_entropy": MEASURES["hue_entropy"].label, "accuracy": "accuracy"}
    names = {name: label for name, label in names.items() if all(name in run.held_out for run in results.runs)}
    rows = _rows(results, lambda runs: [_interval([run.held_out[name] for run in runs]) for name in names])
    samples = results.protocol.measurement.held_out_samples
    title = f"Prompts that no run was trained on, {samples} samples a prompt: changes from the pretrained model, with 95 % intervals"
    return Sheet(title, ["setting", "seeds", *names.values()], rows)


def cost_sheet(results: Results) -> Sheet:
    """What the runs have spent, means over seeds."""

    def cells(runs: Sequence[RunResult]) -> list[str]:
        names = ("updates", "passes", "decodes", "seconds")
        return [f"{fmean(getattr(run.spent, name) for run in runs):,.0f}" for name in names]

    return Sheet("Costs of a run", ["setting", "seeds", "updates", "U", "decodes", "seconds"], _rows(results, cells))


def _rows(results: Results, cells: Callable[[Sequence[RunResult]], list[str]]) -> list[list[str]]:
    """A row for each measured setting, with the number of its seeds."""
    of: Mapping[Setting, list[RunResult]] = {s: list(results.of(s).values()) for s in results.settings}
    return [[str(setting), _share(len(runs), results), *cells(runs)] for setting, runs in of.items() if runs]


def _share(seeds: int, results: Results) -> str:
    """A number of seeds, of all final ones."""
    return f"{seeds} of {len(results.protocol.final.seeds)}"


def _diverged(each: Tuned) -> str:
    return f" ({each.diverged} diverged)" if each.diverged else ""


def _by_seed(results: Results) -> list[RunResult]:
    """One run of each seed; all have the same pretrained samples."""
    return list({run.seed: run for run in results.runs}.values())


def _is_edge(results: Results, setting: Setting) -> bool:
    method = next(method for method in results.protocol.methods if method.name == setting.name)
    return is_at_the_edge(setting, method)


def _cell(values: Sequence[float], sign: str = "") -> str:
    """The mean, followed by the lowest and the highest value."""
    mean = _text(fmean(values), sign)
    return mean if len(values) == 1 else f"{mean} [{_text(min(values), sign)}, {_text(max(values), sign)}]"


def _interval(differences: Sequence[float]) -> str:
    """The mean difference, followed by its interval."""
    found = paired(differences)
    mean = _text(found.mean, "+")
    return mean if found.n == 1 else f"{mean} [{_text(found.low, '+')}, {_text(found.high, '+')}]"


def _text(value: float, sign: str = "") -> str:
    """Three digits; what is 0 but for rounding is 0."""
    return f"{0.0 if abs(value) <= 1e-6 else value:{sign}.3g}"
