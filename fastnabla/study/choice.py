"""The choice of learning rates from the tuning runs."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from statistics import variance as variance_of

from fastnabla.study.plan import Setting
from fastnabla.study.protocol import Contender


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A setting's tuning runs: means over the seeds that ended of the change from the pretrained model."""

    setting: Setting
    gain: float
    """Of the mean reward."""
    losses: Sequence[float]
    """Of hue entropy, as a share of its ceiling, by seed."""
    diverged: int = 0
    """Number of seeds that ended early, or whose samples are not finite."""

    @property
    def loss(self) -> float:
        """Of hue entropy, its mean."""
        return fmean(self.losses)


def tuned(setting: Setting, changes: Sequence[tuple[float, float]], diverged: int = 0) -> Tuned:
    """Summarise the (gain, loss) of at least one tuning run."""
    gains, losses = zip(*changes, strict=True)
    return Tuned(setting=setting, gain=fmean(gains), losses=losses, diverged=diverged)


def loss_error(results: Iterable[Tuned]) -> float:
    """The standard error of a mean loss, from the spread between seeds, pooled over those with two seeds or more.

    It is nan if there are none. With different numbers of seeds it is that of the smallest.
    """
    spread = [result.losses for result in results if len(result.losses) > 1]
    if not spread:
        return math.nan
    variance = sum(variance_of(losses) * (len(losses) - 1) for losses in spread) / sum(len(own) - 1 for own in spread)
    return math.sqrt(variance / min(map(len, spread)))


def choose(results: Sequence[Tuned], allowed: float) -> Tuned:
    """Of one method's learning rates, the one with the highest gain among those whose loss is at most `allowed`; if there
    are none, the one with the least loss. A learning rate with which a run diverged is chosen only if there is no other."""
    results = [result for result in results if not result.diverged] or results
    kept = [result for result in results if result.loss <= allowed]
    return max(kept, key=lambda result: result.gain) if kept else min(results, key=lambda result: result.loss)


def chosen_settings(
    methods: Sequence[Contender], results: Mapping[str, Sequence[Tuned]], allowed_losses: Sequence[float]
) -> dict[Setting, list[str]]:
    """The settings to compare, and what each was chosen for: `choose` for every method and allowed loss.

    A reason is the allowed loss, such as "5%", followed by "(least loss)" if all learning rates lose more.

    Args:
        methods: to compare. Those with a single learning rate have no choice; others without results are left out.
        results: method's name → the results of its learning rates.
        allowed_losses: see `fastnabla.study.protocol.Final`.
    """
    chosen: dict[Setting, list[str]] = {}
    for allowed in allowed_losses:
        for method in methods:
            if not method.is_tuned:
                chosen[Setting(method.name, method.learning_rates[0])] = ["not tuned"]
            elif method.name in results:
                choice = choose(results[method.name], allowed)
                missed = "" if choice.loss <= allowed else " (least loss)"
                chosen.setdefault(choice.setting, []).append(f"{allowed:.0%}{missed}")
    return chosen


def is_at_the_edge(choice: Setting, method: Contender) -> bool:
    """Whether the chosen learning rate is the lowest or the highest that was tried, so that another might be better."""
    rates = method.learning_rates
    return method.is_tuned and choice.learning_rate in (min(rates), max(rates))
