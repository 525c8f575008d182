"""Guards of a run: updates that are not finite are skipped, spikes are logged and counted, and an evaluation that passes a
bound ends the run.
"""

import itertools
import logging
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig
from fastnabla.methods.accumulation import StepReport
from fastnabla.methods.zero_gradients import REWARD_GRADIENT, require_gradient

logger = logging.getLogger("fastnabla")

# Settings

LARGEST_FULL_RATE = 1e-4
"""Largest learning rate of all parameters that is not warned of. diffusers' example of full finetuning has 1e-5."""


def warn_of_learning_rate(config: TrainConfig) -> None:
    """Log a warning if all parameters are trained with a LoRA's learning rate."""
    rate = config.optimizer.learning_rate
    if config.lora.rank == 0 and rate > LARGEST_FULL_RATE:
        logger.warning(
            "optimizer.learning_rate = %g: suits a LoRA, but lora.rank = 0 trains all parameters, and each update changes "
            "every weight by about this much; use --optimizer.learning-rate %s",
            rate,
            "1e-6" if config.optimizer.name == "lion8bit" else "1e-5",
        )


# Updates

MAX_NAMED = 3
"""Maximum number of transitions named in a message."""

REMEDIES = {
    "norm_reward": "the reward's gradient overflows or is undefined: try `python -m fastnabla.rewards check`, a smaller "
    "weight in reward.terms, or reward.clip",
    "norm_ref": "the pretrained network's outputs are not finite: use --model.dtype bfloat16 or float32",
    "trust": "the finetuned network's outputs are not finite: use --model.dtype bfloat16 or float32, or lower "
    "optimizer.learning_rate",
    "loss_reverse": "the reverse residual overflows: lower objective.beta, or use --model.dtype bfloat16 or float32",
    "loss_forward": "the forward residual overflows: lower objective.beta or optimizer.learning_rate",
    "residual": "the balance residual overflows: lower objective.beta or optimizer.learning_rate",
    "ratio": "the policy has left the one that sampled: lower optimizer.learning_rate or rollout.updates",
    "advantage": "no sample of the update has a finite reward: lower optimizer.learning_rate",
    "reward": "samples or their rewards are not finite: lower optimizer.learning_rate",
}
"""Remedies by statistic of a transition. The first statistic that is not finite counts."""

WATCHED = ("loss", "grad_norm_lora", "grad_norm_flow")
"""Metrics that are checked for spikes."""
WINDOW, MIN_HISTORY = 50, 10
"""Number of updates that the median is taken over, and the minimum number."""


class Guard:
    """Decides whether an update is applied, and counts its spikes.

    Args:
        prompts: texts by prompt number.
        timestep: timesteps by step, `[T]`.
        max_skipped: the run ends after this many skipped updates in a row.
        skipped: number of consecutive updates skipped before a resume.
        clips: whether rewards are clipped. A batch may then have no reward gradient.
        spike_factor: a metric above this multiple of its median is a spike; None counts none.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        timestep: Tensor,
        max_skipped: int,
        skipped: int = 0,
        clips: bool = False,
        spike_factor: float | None = None,
    ) -> None:
        self.prompts, self.timestep = prompts, timestep.tolist()
        self.max_skipped, self.skipped, self.clips, self.spike_factor = max_skipped, skipped, clips, spike_factor
        self._sources = self._remedy = ""

    def accepts(self, update: int, report: StepReport, norms: dict[str, Tensor]) -> bool:
        """Whether the loss and the gradient norms of update number `update` are finite. Waits for the device once.

        If they are not, a warning names the terms, timesteps and prompts that are not finite.

        Raises:
            ZeroGradientError: the gradient of the policy or of the reward is zero where it must not be.
        """
        loss = report.losses["loss"]
        values = torch.stack([value.to(loss) for value in (loss, *norms.values(), *report.signals.values())]).tolist()
        if all(map(math.isfinite, values)):
            signals = dict(zip(report.signals, values[1 + len(norms) :], strict=True))
            if self.clips and signals.get(REWARD_GRADIENT) == 0:
                logger.warning("update %d: no reward has a gradient; all may be beyond reward.clip", update)
                del signals[REWARD_GRADIENT]
            require_gradient(update, signals, values[1 + list(norms).index("grad_norm_lora")], report.path)
            self.skipped = 0
            return True
        self.skipped += 1
        self._sources, self._remedy = trace(report, norms, self.prompts, self.timestep)
        logger.warning("update %d is skipped (%d in a row). Not finite: %s", update, self.skipped, self._sources)
        return False

    def check(self, update: int) -> None:
        """End the run if too many updates were skipped in a row. Call it after update number `update` is recorded.

        Raises:
            FloatingPointError: `max_skipped` updates in a row were skipped.
        """
        if self.skipped >= self.max_skipped:
            raise FloatingPointError(
                f"the loss is not finite after update {update}, and {self.skipped} updates in a row were skipped "
                f"(max_skipped = {self.max_skipped}). Not finite in the last: {self._sources}. Most likely "
                f"{self._remedy}."
            )

    def count_spikes(
        self, update: int, metrics: dict[str, float], records: Sequence[dict[str, Any]], report: StepReport
    ) -> int:
        """How many metrics of an update are spikes. A warning names them and the row that contributes most; training is
        unchanged.

        Args:
            update: number of the update.
            metrics: its metrics by name.
            records: the run's metric records before it. A resumed run has the same, so it finds the same spikes.
            report: the step's. Its rows are read only if there is a spike; this waits for the device.
        """
        found = spikes(metrics, records, self.spike_factor) if self.spike_factor is not None else {}
        if found:
            said = [
                f"{name} is {metrics[name]:.4g}, {abs(metrics[name]) / median:.3g} times its median {median:.4g}"
                for name, median in found.items()
            ]
            row = largest_row(report.rows, self.prompts, self.timestep)
            logger.warning("update %d: %s; %s", update, "; ".join(said), row)
        return len(found)


def trace(
    report: StepReport, norms: dict[str, Tensor], prompts: Sequence[str], timestep: Sequence[float]
) -> tuple[str, str]:
    """What is not finite in a step, in words, and a remedy. Waits for the device.

    Args:
        report: the step's.
        norms: gradient norms by name.
        prompts: texts by prompt number.
        timestep: timesteps by step.
    """
    rows = {name: values.cpu() for name, values in report.rows.items()}
    bad = {name: ~values.isfinite() for name, values in rows.items()}
    found = torch.stack(list(bad.values())).any(0).nonzero().flatten().tolist()
    sources = [
        f"{', '.join(name for name in bad if bad[name][row])}{place(rows, row, prompts, timestep)}"
        for row in found[:MAX_NAMED]
    ]
    if len(found) > MAX_NAMED:
        sources.append(f"and {len(found) - MAX_NAMED} other rows")
    if not found:
        names = [name for name, norm in norms.items() if not bool(norm.isfinite())]
        sources = [f"{', '.join(names) or 'the sum of the losses'}, though each transition's loss is finite"]
    remedy = next((REMEDIES[name] for name in REMEDIES if name in bad and bool(bad[name].any())), None)
    remedy = remedy or "gradients overflow: lower objective.beta, or use --model.dtype bfloat16 or float32"
    return "; ".join(sources), remedy


def median_of(records: Sequence[dict[str, Any]], name: str) -> float | None:
    """Median of the absolute values of a metric in the last `WINDOW` training records. None, which stands for a value that is
    not finite, does not count.

    Returns:
        The median; None if there are fewer than `MIN_HISTORY` values.
    """
    training = itertools.islice((record for record in reversed(records) if record["phase"] == "train"), WINDOW)
    values = [abs(record[name]) for record in training if record.get(name) is not None]
    return statistics.median(values) if len(values) >= MIN_HISTORY else None


def spikes(metrics: dict[str, float], records: Sequence[dict[str, Any]], factor: float) -> dict[str, float]:
    """Medians, by name, of the `WATCHED` metrics whose absolute value is finite and more than `factor` times their median. A
    metric with a median of 0 has no spikes."""
    medians = {name: median_of(records, name) for name in WATCHED if math.isfinite(metrics.get(name, math.nan))}
    return {name: median for name, median in medians.items() if median and abs(metrics[name]) > factor * median}


def largest_row(rows: dict[str, Tensor], prompts: Sequence[str], timestep: Sequence[float]) -> str:
    """The row with the largest loss, in words. Without losses by row, the one with the largest residual, ratio or reward."""
    parts = {name: values for name, values in rows.items() if name.startswith("loss_")}
    if not parts:
        parts = {name: rows[name] for name in ("residual", "ratio", "reward") if name in rows}
    size = torch.stack([values.detach().float().cpu().abs() for values in parts.values()]).sum(0)
    row = int(size.nan_to_num(nan=-1.0).argmax())
    share = f", {size[row] / size.sum():.0%} of the sum over {len(size)} rows," if len(size) > 1 else ""
    return f"the largest {' + '.join(parts)}{share} is{place(rows, row, prompts, timestep)}"


def place(rows: dict[str, Tensor], row: int, prompts: Sequence[str], timestep: Sequence[float]) -> str:
    """Timestep and prompt of a row, in words. A method whose rows are whole trajectories has no timestep."""
    at = f" at timestep {timestep[rows['step_index'][row]]:g}" if "step_index" in rows else ""
    return f"{at} of a sample for {prompts[rows['prompt'][row]]!r}"


# Evaluations


class BoundPassed(Exception):
    """An evaluation passed one of the run's bounds. The message says which."""

    STATUS = 3
    """Exit status of a run that ends this way."""


def require_measurable(config: EvaluationConfig, probe: Any | None) -> None:
    """Check that `probe` measures what `config` bounds.

    Raises:
        ValueError: the probe has no features to measure a distance with.
    """
    if config.stop_above_prior is not None and not hasattr(probe, "features"):
        raise ValueError(
            f"evaluation.stop_above_prior = {config.stop_above_prior!r}: evaluation.probe = {config.probe!r} compares "
            "images and has no features to measure a distance from the prior with; use another probe, or None."
        )


def passed_bound(config: EvaluationConfig, records: Sequence[dict[str, Any]]) -> str | None:
    """The bound that the newest evaluation in `records` has passed, in words; None if it has passed none.

    Both bounds are relative to the pretrained model's value, in evaluation 0. A value that is not finite counts as passed.
    When a reward is hacked, it keeps rising while these bounds are passed.
    """
    evaluations = sorted((r for r in records if r["phase"] == "evaluate"), key=lambda record: record["update"])
    for field, name, sign in (
        ("stop_below_diversity", "pairwise_distance", -1),
        ("stop_above_prior", "prior_distance", 1),
    ):
        bound = getattr(config, field)
        if bound is None or len(evaluations) < 2:
            continue
        before, now = (math.nan if r.get(name) is None else r[name] for r in (evaluations[0], evaluations[-1]))
        if not sign * now <= sign * bound * before:
            ratio = now / before if before else math.nan
            return (
                f"evaluation.{field} = {bound:g} is passed after update {evaluations[-1]['update']}: {name} is {now:.4g}, "
                f"{ratio:.3g} times the pretrained model's {before:.4g}"
            )
    return None
