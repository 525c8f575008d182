"""One method against each other one, paired by seed."""

import dataclasses
import math
from collections.abc import Collection
from statistics import fmean

from fastnabla.study.measures import MEASURES
from fastnabla.study.protocol import Claims, Protocol
from fastnabla.study.results import Results
from fastnabla.study.statistics import Difference, holm, paired
from fastnabla.utils.require import require


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The difference of a measure between two methods at equal gain of the reward: the method's minus the other's."""

    other: str
    measure: str
    difference: Difference
    """Over the seeds with which both methods reach the gain."""
    scales: tuple[float, float]
    """Mean scales of the LoRA at which they do, the method's and the other's."""
    is_tested: bool
    """Whether these are all final seeds of the protocol. Otherwise there is no test: seeds that have not been run yet may say
    otherwise, and those that do not reach the gain are not like the others."""
    adjusted: float
    """The p-value, adjusted for the whole family; nan if there is none (`fastnabla.study.statistics.paired`)."""

    @property
    def verdict(self) -> str:
        """What the difference says about the method: "better", "worse", "not resolved" (`Difference.holds`) or "not tested"."""
        if not self.is_tested:
            return "not tested"
        if not self.difference.holds(self.adjusted):
            return "not resolved"
        return "better" if self.difference.mean * MEASURES[self.measure].sign > 0 else "worse"


def comparisons(results: Results) -> list[Comparison]:
    """All comparisons of the protocol's claims. Methods that do not reach the gain with any seed in common are left out.

    The family is that of the protocol: comparisons that are left out count too, so p-values do not depend on which they are.

    Raises:
        ValueError: a measure of the claims has not been measured.
    """
    claims = results.protocol.claims
    for run in results.runs:
        require_measured(claims, run.end)
    own = results.at_gain(claims.method, claims.gain)
    found: list[Comparison] = []
    for contender in results.protocol.methods:
        other = results.at_gain(contender.name, claims.gain)
        if own is None or other is None or contender.name == claims.method:
            continue
        pairs = [(own.places[seed], other.places[seed]) for seed in sorted(own.places.keys() & other.places.keys())]
        for measure in claims.measures if pairs else ():
            found.append(
                Comparison(
                    other=contender.name,
                    measure=measure,
                    difference=paired([a.measures[measure] - b.measures[measure] for a, b in pairs]),
                    scales=(fmean(a.scale for a, _ in pairs), fmean(b.scale for _, b in pairs)),
                    is_tested=own.is_complete and other.is_complete,
                    adjusted=math.nan,
                )
            )
    p_values = [each.difference.p if each.is_tested else math.nan for each in found]
    adjusted = holm([*p_values, *[math.nan] * (family_size(results.protocol) - len(found))])[: len(found)]
    return [dataclasses.replace(each, adjusted=p) for each, p in zip(found, adjusted, strict=True)]


def family_size(protocol: Protocol) -> int:
    """Number of comparisons whose p-values are adjusted together."""
    return (len(protocol.methods) - 1) * len(protocol.claims.measures)


def require_measured(claims: Claims, measured: Collection[str]) -> None:
    """Check that the measures of the claims are among the `measured` ones.

    Raises:
        ValueError: one is not, because the probe has no features or no accuracy.
    """
    for name in claims.measures:
        known = ", ".join(other for other in measured if MEASURES[other].sign and other != "reward")
        require(name in measured, "claims.measures", name, f"evaluation.probe cannot measure it; choose from {known}.")
