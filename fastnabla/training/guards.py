"""Updates whose loss or gradients are not finite: kept out of the weights, and traced to a term, a timestep, a prompt.

Whether all is finite is one number, read once an update; the rest is looked at only if it is not.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnabla.methods.accumulation import StepReport
from fastnabla.methods.zero_gradients import REWARD_GRADIENT, require_gradient

logger = logging.getLogger("fastnabla")

TOLD = 3
"""Most transitions named in one message."""

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
    "reward": "samples or their rewards are not finite: lower optimizer.learning_rate",
}
"""What to do, by the statistic of a transition; the first that is not finite counts."""


class Guard:
    """Decides whether an update is made.

    Args:
        prompts: texts of the prompt numbers.
        timestep: timesteps by step, `[T]`.
        most: so many skipped updates in a row end the run.
        skipped: updates skipped last, in a row, if the run is resumed.
        clips: rewards are clipped, so that a batch of them may rightly have no gradient.
    """

    def __init__(
        self, prompts: Sequence[str], timestep: Tensor, most: int, skipped: int = 0, clips: bool = False
    ) -> None:
        self.prompts, self.timestep, self.most, self.skipped = prompts, timestep.tolist(), most, skipped
        self.clips = clips
        self._sources = self._remedy = ""

    def accepts(self, update: int, report: StepReport, norms: dict[str, Tensor]) -> bool:
        """Whether the loss and the gradients' norms of update number `update` are finite. Waits for the device.

        If not, a warning says where that comes from.

        Raises:
            ZeroGradientError: the policy's gradient is zero, or the reward's, where it must not be.
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
        logger.warning("update %d is skipped, %d in a row by now: not finite %s", update, self.skipped, self._sources)
        return False

    def check(self, update: int) -> None:
        """Call it when update number `update` is recorded.

        Raises:
            FloatingPointError: too many were skipped in a row.
        """
        if self.skipped >= self.most:
            raise FloatingPointError(
                f"the loss is not finite after update {update}, and {self.skipped} updates in a row were skipped "
                f"(max_skipped = {self.most}). In the last, not finite {self._sources}. Most likely {self._remedy}."
            )


def trace(
    report: StepReport, norms: dict[str, Tensor], prompts: Sequence[str], timestep: Sequence[int]
) -> tuple[str, str]:
    """What of a step is not finite, in words, and what to do about it; waits for the device.

    Args:
        report: the step's.
        norms: of gradients, by name.
        prompts: texts of the prompt numbers.
        timestep: timesteps by step.
    """
    rows = {name: values.cpu() for name, values in report.rows.items()}
    bad = {name: ~values.isfinite() for name, values in rows.items()}
    found = torch.stack(list(bad.values())).any(0).nonzero().flatten().tolist()
    sources = [
        f"are {', '.join(name for name in bad if bad[name][row])}{place(rows, row, prompts, timestep)}"
        for row in found[:TOLD]
    ]
    if len(found) > TOLD:
        sources.append(f"and so for {len(found) - TOLD} other rows")
    if not found:
        names = [name for name, norm in norms.items() if not bool(norm.isfinite())]
        sources = [f"is {', '.join(names) or 'the sum of the losses'}, though each transition's loss is finite"]
    remedy = next((REMEDIES[name] for name in REMEDIES if name in bad and bool(bad[name].any())), None)
    remedy = remedy or "gradients overflow: lower objective.beta, or use --model.dtype bfloat16 or float32"
    return "; ".join(sources), remedy


def place(rows: dict[str, Tensor], row: int, prompts: Sequence[str], timestep: Sequence[int]) -> str:
    """Where row `row` of a step's `rows` comes from, in words; no timestep for a method whose rows are whole trajectories."""
    at = f" at timestep {timestep[rows['step_index'][row]]}" if "step_index" in rows else ""
    return f"{at} of a sample for {prompts[rows['prompt'][row]]!r}"
