"""The options of an evaluation. They can be imported without torch, so that command lines are parsed quickly."""

import dataclasses

from fastnabla.run.weights import WeightsName

FILE = "evaluation.json"
"""Results of the raw weights, in the run folder."""
FORMAT = 3
"""Version of the results. It changes with the meaning or the names of the numbers; a comparison repeats older evaluations."""


@dataclasses.dataclass(kw_only=True, slots=True)
class EvaluationOptions:
    """Number of samples, noise, probe and weights of an evaluation, and how the target is estimated."""

    samples_per_prompt: int = 32
    """Samples per prompt of the pretrained and of the finetuned model, from the same noise."""
    reference_samples: int = 256
    """Samples per prompt of the pretrained model, from other noise. They estimate the prior and, by re-weighting, the
    target. They are kept in the run folder."""
    ess: float = 0.05
    """Smallest effective sample size of each prompt's target, as a fraction of its reference samples."""
    seed: int = 0
    """Seed of the noise. It is not the run's seed, so runs with different seeds are compared on the same noise."""
    batch: int | None = None
    """Trajectories sampled at once. None: the run's rollout.batch."""
    probe: str | None = None
    """Network that measures diversity and distances, as in evaluation.probe. None: the run's probe."""
    weights: WeightsName = "raw"
    """Finetuned weights to evaluate. "raw": the weights after the last update. "ema": their moving average (optimizer.ema).
    "best": the weights of the evaluation with the highest reward during training."""

    def __post_init__(self) -> None:
        for name, least in (("samples_per_prompt", 2), ("reference_samples", 4), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} = {value}: must be at least {least}.")
        if not 0 < self.ess <= 1 or self.ess * self.reference_samples <= 1:
            raise ValueError(
                f"ess = {self.ess}: must be in (0, 1], and ess × reference_samples ({self.reference_samples}) must be "
                "more than one sample."
            )


def file_of(options: EvaluationOptions) -> str:
    """Name of the results file in the run folder."""
    return FILE if options.weights == "raw" else f"evaluation-{options.weights}.json"
