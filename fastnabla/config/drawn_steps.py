"""The steps of a trajectory that are trained on: `rollout.fraction` of `sampler.steps`."""

import math


def drawn_steps(num_steps: int, fraction: float) -> int:
    """K − 1, the number of steps drawn from a trajectory of `num_steps` in addition to the last."""
    return int(num_steps * fraction + 1e-9)


def fraction_of(drawn: int, num_steps: int) -> float:
    """The shortest decimal fraction that draws `drawn` of `num_steps` steps."""
    fractions = (math.ceil(drawn / num_steps * 10**digits - 1e-9) / 10**digits for digits in range(1, 16))
    return next((part for part in fractions if drawn_steps(num_steps, part) == drawn), drawn / num_steps)


def fraction_remedy(fraction: float, num_steps: int, draw: str) -> str | None:
    """The end of an error message if `draw` cannot draw this fraction of the steps; None if it can."""
    drawn = drawn_steps(num_steps, fraction)
    if drawn == 0:
        return f"leaves no transition of sampler.steps = {num_steps}; use at least {fraction_of(1, num_steps)}."
    if draw == "stratified":
        if num_steps % drawn == 0:
            return None
        divisors = {part for low in _small_divisors(num_steps) for part in (low, num_steps // low)}
        nearest = max(part for part in divisors if part < drawn), min(part for part in divisors if part > drawn)
        use = " or ".join(str(fraction_of(part, num_steps)) for part in nearest)
        return f"gives {drawn} strata, which do not divide sampler.steps = {num_steps}; use {use}, or --rollout.draw uniform."
    if drawn == num_steps:
        most = fraction_of(num_steps - 1, num_steps)
        return f"must leave out at least one step, to draw the others from; use at most {most}."
    return None


def _small_divisors(number: int) -> list[int]:
    """The divisors of `number` up to its square root."""
    return [part for part in range(1, math.isqrt(number) + 1) if number % part == 0]
