"""One method against each other one, paired by seed."""

import dataclasses
import math
from collections.abc import Collection

from fastnabla.study.measures import MEASURES
from fastnabla.study.protocol import Claims
from fastnabla.study.results import Results
from fastnabla.study.statistics import Difference, holm, paired
from fastnabla.utils.require import require


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The difference of a measure between two methods at equal gain of the reward: the method's minus the other's."""

    other: str
    measure: str
    difference: Difference
    adjusted: float
    """The p-value, adjusted for the whole family; nan if there is none (`fastnabla.study.statistics.paired`)."""

    @property
    def verdict(self) -> str:
        """What the difference says about the method: "better", "worse" or "not resolved" (`Difference.holds`)."""
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
    found: list[tuple[str, str, Difference]] = []
    for contender in results.protocol.methods:
        other = results.at_gain(contender.name, claims.gain)
        if own is None or other is None or contender.name == claims.method:
            continue
        seeds = sorted(own[1].keys() & other[1].keys())
        for measure in claims.measures if seeds else ():
            pairs = ((own[1][seed].measures[measure], other[1][seed].measures[measure]) for seed in seeds)
            found.append((contender.name, measure, paired([a - b for a, b in pairs])))
    family = (len(results.protocol.methods) - 1) * len(claims.measures)
    p_values = [difference.p for *_, difference in found]
    adjusted = holm([*p_values, *[math.nan] * (family - len(found))])[: len(found)]
    return [
        Comparison(other=other, measure=measure, difference=difference, adjusted=p)
        for (other, measure, difference), p in zip(found, adjusted, strict=True)
    ]


def require_measured(claims: Claims, measured: Collection[str]) -> None:
    """Check that the measures of the claims are among the `measured` ones.

    Raises:
        ValueError: one is not, because the probe has no features or no accuracy.
    """
    for name in claims.measures:
        known = ", ".join(other for other in measured if MEASURES[other].sign and other != "reward")
        require(name in measured, "claims.measures", name, f"evaluation.probe cannot measure it; choose from {known}.")
