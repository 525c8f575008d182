"""The tables of a study."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from fastnabla.comparison.sheet import Sheet
from fastnabla.study.choice import Tuned, is_at_the_edge
from fastnabla.study.claims import Comparison
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
        cells = {each.setting: f"{each.gain:+.2f} / {-each.loss:+.3f} ({each.seeds}){_diverged(each)}" for each in own}
        texts = {s: f"**{text}**" if s in results.settings else text for s, text in cells.items()}
        rows.append([name, *(texts.get(Setting(name, rate), "") for rate in rates)])
    title = (
        "Tuning: change of the reward / of hue entropy, means over seeds (their number); chosen learning rates in bold"
    )
    return Sheet(title, ["method", *(f"{rate:g}" for rate in rates)], rows)


def claim_sheet(found: Sequence[Comparison], results: Results) -> Sheet:
    """The comparisons of the claims, with their intervals."""
    claims = results.protocol.claims
    rows = [
        [
            each.other,
            MEASURES[each.measure].label,
            f"{each.difference.n}",
            f"{each.difference.mean:+.3g}",
            "" if each.difference.n == 1 else f"[{each.difference.low:+.3g}, {each.difference.high:+.3g}]",
            "" if math.isnan(each.adjusted) else f"{each.adjusted:.2g}",
            each.verdict,
        ]
        for each in found
    ]
    title = f"{claims.method} against each other method where both have gained {claims.gain:g}"
    columns = ["against", "measure", "seeds", "difference", "95 % interval", "adjusted p", f"{claims.method} is"]
    return Sheet(title, columns, rows, texts=2)


def gain_sheet(results: Results, gain: float) -> Sheet:
    """All methods at equal gain of the reward: means over seeds, with [lowest, highest]."""
    names = [name for name in END if all(name in run.end for run in results.runs)]
    rows = [["pretrained", "", "0", *(_cell([run.path[0].measures[n] for run in _by_seed(results)]) for n in names)]]
    for method in results.protocol.methods:
        found = results.at_gain(method.name, gain)
        if found is not None:
            setting, places = found
            scale = _cell([place.scale for place in places.values()])
            cells = [_cell([place.measures[name] for place in places.values()]) for name in names]
            rows.append([str(setting), str(len(places)), scale, *cells])
    samples = results.protocol.measurement.scale_samples
    title = f"Where the reward has gained {gain:g}, by the scale of the LoRA, with {samples} samples a prompt"
    return Sheet(title, ["setting", "seeds", "scale", *(MEASURES[name].label for name in names)], rows)


def end_sheet(results: Results) -> Sheet:
    """Every setting at the end of training: the pretrained model's values, and paired changes from them with intervals."""
    names = ["reward", *(name for name in END if all(name in run.end for run in results.runs))]
    first = _by_seed(results)
    rows = [["pretrained", str(len(first)), *(_cell([run.pretrained[name] for run in first]) for name in names), "0"]]
    for setting in results.settings:
        runs = list(results.of(setting).values())
        if runs:
            cells = [_interval([run.end[name] - run.pretrained[name] for run in runs]) for name in names]
            edge = "" if not _is_edge(results, setting) else " (edge)"
            rows.append([f"{setting}{edge}", str(len(runs)), *cells, _cell([run.divergence for run in runs])])
    labels = [MEASURES[name].label for name in names]
    title = "At the end of training: changes from the pretrained model, with 95 % intervals"
    return Sheet(title, ["setting", "seeds", *labels, "KL along trajectories without the last two steps, nats"], rows)


def held_out_sheet(results: Results) -> Sheet:
    """Changes on prompts that no run was trained on."""
    names = {"reward": "reward", "hue_entropy": MEASURES["hue_entropy"].label, "accuracy": "accuracy"}
    names = {name: label for name, label in names.items() if all(name in run.held_out for run in results.runs)}
    rows = _rows(results, lambda runs: [_interval([run.held_out[name] for run in runs]) for name in names])
    return Sheet(
        "Prompts that no run was trained on: changes from the pretrained model", ["setting", *names.values()], rows
    )


def cost_sheet(results: Results) -> Sheet:
    """What the runs have spent, means over seeds."""

    def cells(runs: Sequence[RunResult]) -> list[str]:
        names = ("updates", "passes", "decodes", "seconds")
        return [f"{fmean(getattr(run.spent, name) for run in runs):,.0f}" for name in names]

    return Sheet("Costs of a run", ["setting", "updates", "U", "decodes", "seconds"], _rows(results, cells))


def _rows(results: Results, cells: Callable[[Sequence[RunResult]], list[str]]) -> list[list[str]]:
    """A row for each measured setting."""
    of: Mapping[Setting, list[RunResult]] = {s: list(results.of(s).values()) for s in results.settings}
    return [[str(setting), *cells(runs)] for setting, runs in of.items() if runs]


def _diverged(each: Tuned) -> str:
    return f" ({each.diverged} diverged)" if each.diverged else ""


def _by_seed(results: Results) -> list[RunResult]:
    """One run of each seed; all have the same pretrained samples."""
    return list({run.seed: run for run in results.runs}.values())


def _is_edge(results: Results, setting: Setting) -> bool:
    method = next(method for method in results.protocol.methods if method.name == setting.name)
    return is_at_the_edge(setting, method)


def _cell(values: Sequence[float]) -> str:
    """The mean, followed by the lowest and the highest value."""
    mean = _text(fmean(values))
    return mean if len(values) == 1 else f"{mean} [{_text(min(values))}, {_text(max(values))}]"


def _interval(differences: Sequence[float]) -> str:
    """The mean difference, followed by its interval."""
    found = paired(differences)
    mean = _text(found.mean, "+")
    return mean if found.n == 1 else f"{mean} [{_text(found.low, '+')}, {_text(found.high, '+')}]"


def _text(value: float, sign: str = "") -> str:
    """Three digits; what is 0 but for rounding is 0."""
    return f"{0.0 if abs(value) <= 1e-12 else value:{sign}.3g}"
