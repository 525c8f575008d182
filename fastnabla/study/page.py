"""The page of a study in Markdown, written beside its protocol."""

import math
from collections.abc import Sequence
from pathlib import Path

from fastnabla.study.choice import loss_error
from fastnabla.study.claims import Comparison, comparisons, family_size
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
    """Write the page and its pictures beside the protocol. Returns their paths.

    Raises:
        ValueError: no final run has been measured.
    """
    if not results.runs:
        raise ValueError("no final run has been measured yet, so there is no page.")
    page, stem = protocol_file.with_suffix(".md"), protocol_file.stem
    pictures = {name: protocol_file.with_name(f"{stem}-{name}.png") for name in results.protocol.claims.measures}
    text = "\n".join(_parts(results, protocol_file, [picture.name for picture in pictures.values()]))
    for name, picture in pictures.items():
        write_file(picture, fronts(results, name))
    write_file(page, text)
    return [page, *pictures.values()]


def _parts(results: Results, protocol_file: Path, pictures: Sequence[str]) -> list[str]:
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
        CLAIMS.format(level=LEVEL, family=family_size(protocol), samples=protocol.measurement.scale_samples),
        gain_sheet(results, claims.gain).markdown(),
        *(f"![fronts]({picture})\n" for picture in pictures),
        FRONTS,
        "## At the end of training\n",
        end_sheet(results).markdown(),
        END,
    ]
    if results.runs[0].held_out:
        parts.append(held_out_sheet(results).markdown())
    if results.tuned:
        parts += ["## Tuning\n", tuning_sheet(results).markdown()]
        error = loss_error(each for own in results.tuned.values() for each in own if each.setting in results.settings)
        parts += [TUNING.format(error=error)] if math.isfinite(error) else []
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
        "ceiling on average over these seeds, or the one with the least loss if there is none. They may coincide.",
    ]
    if not _is_tuned(protocol):
        tuned = ["Nothing is tuned."]
    return [
        f"All runs start from the preset `{protocol.preset}`{changed}, and spend at most {protocol.passes:,.0f} U.",
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
    untested = list(dict.fromkeys(each.other for each in found if not each.is_tested))
    if untested:
        lines.append(
            f"- Not tested, because the two do not both gain {gain:g} with all final seeds: {_list(untested)}."
        )
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
    'Differences are paired by seed. "seeds" is the number of seeds with which both methods gain this much, of all final seeds; "scales" '
    "are the mean factors of the two LoRAs there. Beyond 1 a LoRA is extrapolated. All samples at the scales are {samples} a prompt. A "
    "comparison is tested once all final seeds of both methods have been measured, and if all of them gain this much: runs that fall short "
    "are not like the others. A difference counts if its p-value is below {level:g} and its bootstrap interval does not contain 0. The "
    "p-value is that of a paired t-test, adjusted by Holm's method over all {family} comparisons of the protocol, those that are not made "
    'included. "needed" is the smallest difference that the test tells from 0 with this spread and number of seeds, as the first of so '
    'many claims. So "not resolved" does not mean equal.\n'
)
FRONTS = (
    "Changes from the pretrained model of the same seed, which is the star, with as many samples as in the table above. Dots are seeds at "
    "the end of training, by learning rate. Lines are means over seeds as the LoRA is scaled at inference, dotted beyond scale 1. Each "
    "panel has one method in colour, that of the claims in black, and all others in grey. The vertical line is the gain at which methods "
    "are compared.\n"
)
END = (
    '"chosen for" is the loss of hue entropy that was allowed in tuning. Intervals are bootstrap intervals over seeds, not adjusted for '
    "their number, and too short with few seeds: for Gaussian differences they cover 50 % with 2, 75 % with 3, 80 % with 4, 83 % with 5 and "
    "86 % with 6. The row of the pretrained model gives means [lowest, highest] over seeds; its distances are the floor, because they "
    "compare two sets of the pretrained model's own samples. Fréchet distances have a large floor with so few samples, which depends on "
    "their number; kernel distances are unbiased, so theirs is 0 on average. So do not compare tables with different numbers of samples, "
    "neither in Fréchet distances nor in entropies. Distances within prompts are what the paper reports as FID. KL along trajectories is "
    "what residual ∇-DB and Adjoint Matching penalise themselves. (edge): the chosen learning rate is the lowest or the highest that was "
    "tried.\n"
)
TUNING = (
    "The standard error of a mean change of hue entropy is {error:.3f}, from the spread between seeds of the chosen learning rates. "
    "Whether a learning rate this near to a limit is chosen is chance.\n"
)
COSTS = (
    "Decodes are planned; one with a backward pass counts 1, one without 1/2. Seconds are those of rollouts and updates, on whatever "
    "machine each run had: on a shared one they tell orders of magnitude only. They may lack updates before a crash of the machine.\n"
)
