"""The page of a study in Markdown, written beside its protocol."""

from collections.abc import Sequence
from pathlib import Path

from fastnabla.study.claims import Comparison, comparisons
from fastnabla.study.figures import fronts
from fastnabla.study.measures import MEASURES
from fastnabla.study.protocol import Protocol
from fastnabla.study.records import records_file
from fastnabla.study.results import Results
from fastnabla.study.statistics import LEVEL
from fastnabla.study.tables import (
    claim_sheet,
    cost_sheet,
    end_sheet,
    gain_sheet,
    held_out_sheet,
    method_sheet,
    tuning_sheet,
)
from fastnabla.utils.durable import write_file


def write_page(results: Results, protocol_file: Path) -> list[Path]:
    """Write the page and its picture beside the protocol. Returns their paths.

    Raises:
        ValueError: no final run has been measured.
    """
    if not results.runs:
        raise ValueError("no final run has been measured yet, so there is no page.")
    page, picture = protocol_file.with_suffix(".md"), protocol_file.with_name(f"{protocol_file.stem}-fronts.png")
    write_file(picture, fronts(results))
    write_file(page, "\n".join(_parts(results, protocol_file, picture.name)))
    return [page, picture]


def _parts(results: Results, protocol_file: Path, picture: str) -> list[str]:
    protocol, found = results.protocol, comparisons(results)
    claims = protocol.claims
    parts = [
        f"# {len(protocol.methods)} methods{', tuned alike' if _is_tuned(protocol) else ''}\n",
        f"    python -m fastnabla.study {protocol_file.name if protocol_file.is_absolute() else protocol_file.as_posix()}\n",
        f"remakes this page, which is generated, from the [records of all runs]({records_file(protocol_file).name}); "
        "docs/comparison.md explains the steps.\n",
        *(f"**{remark}**\n" for remark in results.remarks),
        "## Protocol\n",
        *(f"- {line}" for line in _protocol(protocol)),
        "",
        method_sheet(protocol).markdown(),
        f"## {claims.method} at equal reward\n",
        *([f"{claims.note}\n"] if claims.note else []),
        *_verdicts(found, results),
        claim_sheet(found, results).markdown(),
        CLAIMS.format(level=LEVEL, samples=protocol.measurement.scale_samples),
        gain_sheet(results, claims.gain).markdown(),
        f"![fronts]({picture})\n",
        FRONTS,
        "## At the end of training\n",
        end_sheet(results).markdown(),
        END.format(samples=protocol.measurement.samples),
    ]
    if results.runs[0].held_out:
        parts.append(held_out_sheet(results).markdown())
    if results.tuned:
        parts += ["## Tuning\n", tuning_sheet(results).markdown()]
    return [*parts, "## Costs\n", cost_sheet(results).markdown(), COSTS]


def _is_tuned(protocol: Protocol) -> bool:
    """Whether any method has a choice of learning rates."""
    return any(method.is_tuned for method in protocol.methods)


def _protocol(protocol: Protocol) -> list[str]:
    """The protocol, one sentence a line."""
    tuning, final, measured = protocol.tuning, protocol.final, protocol.measurement
    settings = ", ".join(f"`{field}={value}`" for field, value in protocol.settings.items())
    changed = f" with {settings}" if settings else ""
    losses = " and ".join(f"{loss:.0%}" for loss in final.allowed_losses)
    scales = ", ".join(f"{scale:g}" for scale in sorted({1.0, *measured.scales}))
    tuned = [
        f"Every learning rate is run with the seeds {_list(tuning.seeds)} and measured on {tuning.samples} samples a prompt.",
        f"A method's settings are the learning rates with the highest reward that lose at most {losses} of the hue entropy's "
        "ceiling, or the one with the least loss if there is none.",
    ]
    if not _is_tuned(protocol):
        tuned = ["Nothing is tuned."]
    return [
        f"All runs start from the preset `{protocol.preset}`{changed}, and spend {protocol.passes:,.0f} U.",
        *tuned,
        f"Each setting is run with the fresh seeds {_list(final.seeds)} and measured at the end of training "
        f"on {measured.samples} samples a prompt.",
        f"Its LoRA is also scaled by {scales} at inference, with {measured.scale_samples} samples a prompt.",
        "All methods share prompts and noise of a seed, so differences are paired by seed.",
    ]


def _verdicts(found: Sequence[Comparison], results: Results) -> list[str]:
    """The claims in words."""
    method = results.protocol.claims.method
    lines = []
    for verdict, words in (("better", "better than"), ("worse", "worse than"), ("not resolved", "not told apart from")):
        of_measure: dict[str, list[str]] = {}
        for each in found:
            if each.verdict == verdict:
                of_measure.setdefault(each.measure, []).append(each.other)
        lines += [
            f"- `{method}` is {words} {_list(names)} in: {MEASURES[name].label}." for name, names in of_measure.items()
        ]
    gain, reached = results.protocol.claims.gain, {each.other for each in found}
    if results.at_gain(method, gain) is None:
        return [
            f"- Nothing is compared, because `{method}` has no results or does not gain {gain:g} with any seed.",
            "",
        ]
    absent = [each.name for each in results.protocol.methods if each.name not in reached | {method}]
    unknown = [name for name in absent if not results.settings_of(name)]
    short = [name for name in absent if name not in unknown]
    if short:
        lines.append(f"- Not compared, because they do not gain {gain:g} with a seed in common: {_list(short)}.")
    if unknown:
        lines.append(f"- Not compared, because they have no results: {_list(unknown)}.")
    return [*lines, ""]


def _list(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


CLAIMS = (
    'Differences are paired by seed. "seeds" is the number of seeds with which both methods gain this much; others are left out. All '
    "samples at the scales are {samples} a prompt. A difference counts if its p-value is below {level:g} and its bootstrap interval does "
    "not contain 0. The p-value is that of a paired t-test, adjusted by Holm's method over every method and measure of the protocol, those "
    "without a comparison included. With few seeds these intervals are too short: for Gaussian differences they cover 75 % with 3, 80 % "
    "with 4 and 86 % with 6.\n"
)
FRONTS = (
    "Dots are seeds at the end of training. Lines are means over seeds as the LoRA is scaled at inference; the star is the pretrained "
    "model.\n"
)
END = (
    "{samples} samples a prompt. The row of the pretrained model gives means [lowest, highest] over seeds; its distances are "
    "the floor, because they compare two sets of the pretrained model's own samples. Fréchet distances have a large floor with so few "
    "samples; kernel distances are unbiased, so theirs is 0. Distances within prompts are what the paper reports as FID. KL along "
    "trajectories is what residual ∇-DB and Adjoint Matching penalise themselves. (edge): the chosen learning rate is the lowest or the "
    "highest that was tried.\n"
)
COSTS = (
    "Decodes are planned; one with a backward pass counts 1, one without 1/2. Seconds are those of rollouts and updates, on whatever "
    "machine each run had: on a shared one they tell orders of magnitude only. They may lack updates before a crash of the machine.\n"
)
