"""The choice of learning rates from the tuning runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean

from fastnabla.study.plan import Setting
from fastnabla.study.protocol import Contender


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A setting's tuning runs: means over the seeds that ended of the change from the pretrained model."""

    setting: Setting
    seeds: int
    """Number of these seeds."""
    gain: float
    """Of the mean reward."""
    loss: float
    """Of hue entropy, as a share of its ceiling."""
    diverged: int = 0
    """Number of seeds that ended early, or whose samples are not finite."""


def tuned(setting: Setting, changes: Sequence[tuple[float, float]], diverged: int = 0) -> Tuned:
    """Summarise the (gain, loss) of at least one tuning run."""
    gain, loss = (fmean(each) for each in zip(*changes, strict=True))
    return Tuned(setting=setting, seeds=len(changes), gain=gain, loss=loss, diverged=diverged)


def choose(results: Sequence[Tuned], allowed: float) -> Tuned:
    """Of one method's learning rates, the one with the highest gain among those whose loss is at most `allowed`; if there
    are none, the one with the least loss. A learning rate with which a run diverged is chosen only if there is no other."""
    results = [result for result in results if not result.diverged] or results
    kept = [result for result in results if result.loss <= allowed]
    return max(kept, key=lambda result: result.gain) if kept else min(results, key=lambda result: result.loss)


def chosen_settings(
    methods: Sequence[Contender], results: Mapping[str, Sequence[Tuned]], allowed_losses: Sequence[float]
) -> list[Setting]:
    """The settings to compare: `choose` for every method and allowed loss, each setting once.

    Args:
        methods: to compare. Those with a single learning rate have no choice; others without results are left out.
        results: method's name → the results of its learning rates.
        allowed_losses: see `fastnabla.study.protocol.Final`.
    """
    chosen = []
    for allowed in allowed_losses:
        for method in methods:
            if not method.is_tuned:
                chosen.append(Setting(method.name, method.learning_rates[0]))
            elif method.name in results:
                chosen.append(choose(results[method.name], allowed).setting)
    return list(dict.fromkeys(chosen))


def is_at_the_edge(choice: Setting, method: Contender) -> bool:
    """Whether the chosen learning rate is the lowest or the highest that was tried, so that another might be better."""
    rates = method.learning_rates
    return method.is_tuned and choice.learning_rate in (min(rates), max(rates))
