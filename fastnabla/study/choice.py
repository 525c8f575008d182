"""The choice of learning rates from the tuning runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean

from fastnabla.study.plan import Setting


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A setting's tuning runs: means over their seeds of the change from the pretrained model."""

    setting: Setting
    seeds: int
    """Number of runs that ended; a run that diverged is not one."""
    gain: float
    """Of the mean reward."""
    loss: float
    """Of hue entropy, as a share of its ceiling."""


def tuned(setting: Setting, changes: Sequence[tuple[float, float]]) -> Tuned:
    """Summarise the (gain, loss) of at least one tuning run."""
    gain, loss = (fmean(each) for each in zip(*changes, strict=True))
    return Tuned(setting=setting, seeds=len(changes), gain=gain, loss=loss)


def choose(results: Sequence[Tuned], allowed: float) -> Tuned:
    """Of one method's learning rates, the one with the highest gain among those whose loss is at most `allowed`; if there
    are none, the one with the least loss."""
    kept = [result for result in results if result.loss <= allowed]
    return max(kept, key=lambda result: result.gain) if kept else min(results, key=lambda result: result.loss)


def chosen_settings(results: Mapping[str, Sequence[Tuned]], allowed_losses: Sequence[float]) -> list[Setting]:
    """The settings to compare: `choose` for every method and allowed loss, each setting once.

    Args:
        results: method's name → its learning rates.
        allowed_losses: see `fastnabla.study.protocol.Final`.
    """
    chosen = [choose(own, allowed).setting for allowed in allowed_losses for own in results.values()]
    return list(dict.fromkeys(chosen))


def is_at_the_edge(choice: Setting, learning_rates: Sequence[float]) -> bool:
    """Whether the chosen learning rate is the lowest or the highest that was tried, so that another might be better."""
    return choice.learning_rate in (min(learning_rates), max(learning_rates))
