"""The configuration of an analytic run, and the default settings of each method. A field's docstring is its `--help`."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from fastnabla.config.drawn_steps import drawn_steps
from fastnabla.config.method_sections import Direct, PolicyGradient
from fastnabla.config.methods import MethodName
from fastnabla.config.model_sections import FlowConfig, SamplerConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import MemoryConfig, OptimizerConfig, RolloutConfig
from fastnabla.objective.settings import Objective
from fastnabla.utils.require import require

ScheduleName = Literal["log-snr", "stable-diffusion"]


def _adamw(learning_rate: float) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=learning_rate, beta2=0.95, weight_decay=0.0, schedule="cosine")


@dataclasses.dataclass(kw_only=True, slots=True)
class AnalyticConfig:
    """Finetune a diffusion model that is known exactly, towards p_ref · exp(β r), which is also known exactly.

    The pretrained model is the score of a Gaussian mixture. The reward is quadratic, so the target is a mixture as well. A
    perceptron learns the difference, with the sampler, buffer, training step and optimizer that finetune Stable Diffusion.
    The finetuned samples are compared with the target by mode masses and sliced Wasserstein distance. Both are reported with
    their Monte-Carlo floor, the distance of as many exact draws.

    docs/results/analytic.md has the effect of each setting. Try --objective.reverse-target policy, --flow-learning-rate 0, or
    --objective.reward-gradient terminal.
    """

    method: MethodName = "residual-db"
    """Method, as for `python -m fastnabla.train`, with the same training step. It sets the defaults of the other options,
    which --method NAME --help shows."""
    dimension: Literal[2, 16] = 2
    """2: four modes on a ring. 16: six random modes."""
    updates: int = 3200
    """Optimizer updates."""
    seed: int = 0
    """Seed of the training. Evaluations use separate noise, the same for all seeds."""
    run: Path | None = None
    """Run folder, which must not exist. None: the next free runs/analytic-2d-residual-db-001, …"""
    steps: int = 50
    """T, the number of sampler steps."""
    schedule: ScheduleName = "log-snr"
    """Noise schedule. "log-snr": each step changes the signal-to-noise ratio by the same factor. "stable-diffusion": that
    of Stable Diffusion, whose last steps have little noise."""
    spacing: Literal["leading", "trailing"] | None = None
    """Which of the 1000 timesteps are used, as sampler.spacing of `python -m fastnabla.train`. None: "trailing" for
    log-snr, "leading" for stable-diffusion."""
    min_sigma: float | None = None
    """Lower bound of every step's standard deviation, as sampler.min_sigma of `python -m fastnabla.train`. The reference
    and the target have the noise that it adds to finished samples. They are exact if it raises the last step alone. If it
    raises earlier steps too, they assume that the mode of a sample does not change in these steps."""
    width: int = 128
    """Width of the hidden layers of both perceptrons."""
    flow_learning_rate: float = 3e-3
    """Learning rate of the flow network, for methods that have one. 0 removes it (flow.kind = "none") and the reverse
    residual; ∇log F is then estimated by the look-ahead reward alone."""
    flow_average: float | None = None
    """Decay of an average of the flow network for its own target, as flow.average of `python -m fastnabla.train`."""
    exact_flow: bool = False
    """Give residual ∇-DB the exact ∇log F instead of training g_φ with the reverse residual. The remaining error is that of
    the policy and the sampler."""
    reward_factor: float = 1.0
    """Factor on the reward that the method sees; the target does not change. It shows the effect of a wrong scale or, below
    0, a wrong sign."""
    evaluate_every: int = 400
    """Updates between evaluations."""
    samples: int = 4096
    """Samples per evaluation. More samples lower the Monte-Carlo floor, so smaller errors become visible."""
    objective: Objective = dataclasses.field(
        default_factory=lambda: Objective(
            beta=0.6, reverse_target="reference", reverse_weight=300.0, trust_region_weight=0.0
        )
    )
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: _adamw(1e-2))
    rollout: RolloutConfig = dataclasses.field(
        default_factory=lambda: RolloutConfig(trajectories=128, fraction=0.2, updates=8, batch=1024)
    )
    direct: Direct = dataclasses.field(default_factory=Direct)
    policy_gradient: PolicyGradient = dataclasses.field(default_factory=PolicyGradient)

    def __post_init__(self) -> None:
        least = {"updates": 1, "seed": 0, "steps": 2, "width": 1, "evaluate_every": 1, "samples": 2}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {smallest}.")
        if not 0 <= self.flow_learning_rate < float("inf"):
            raise ValueError(f"flow_learning_rate = {self.flow_learning_rate}: must be finite and not negative.")
        if self.optimizer.ema is not None:
            raise ValueError(
                f"optimizer.ema = {self.optimizer.ema}: the analytic testbed evaluates the raw weights; set it to None."
            )
        if not math.isfinite(self.reward_factor):
            raise ValueError(f"reward_factor = {self.reward_factor}: must be finite.")
        if self.flow_average is not None and (self.exact_flow or not self.flow_learning_rate):
            raise ValueError(
                f"flow_average = {self.flow_average}: no flow is trained with exact_flow = True or flow_learning_rate = 0; leave "
                "it out."
            )
        if self.exact_flow and self.objective.prior_weight == 0:
            raise ValueError(
                "objective.prior_weight = 0.0: leaves no prior, so there is no exact flow; set it above 0."
            )
        if self.exact_flow and (self.method, self.objective.reward_gradient) != ("residual-db", "lookahead"):
            raise ValueError(
                "exact_flow = True: needs method = residual-db and objective.reward_gradient = lookahead, not "
                f"{self.method!r} and {self.objective.reward_gradient!r}; change these, or leave it out."
            )
        self.training()

    def training(self) -> TrainConfig:
        """The configuration from which `fastnabla.methods.registry` builds the training step.

        Raises:
            ValueError: the settings do not fit the method.
        """
        rate, objective = self.flow_learning_rate, self.objective
        if self.exact_flow or not rate:
            objective = dataclasses.replace(objective, reverse_target="policy", reverse_weight=0.0)
        return TrainConfig(
            method=self.method,
            updates=self.updates,
            seed=self.seed,
            sampler=SamplerConfig(steps=self.steps, guidance_scale=1.0, spacing=self.spacing, min_sigma=self.min_sigma),
            objective=objective,
            direct=self.direct,
            policy_gradient=self.policy_gradient,
            rollout=self.rollout,
            flow=FlowConfig(learning_rate=rate, weight_decay=0.0, average=self.flow_average)
            if rate
            else FlowConfig(kind="none"),
            optimizer=self.optimizer,
            memory=MemoryConfig(micro_batch=self.rollout.trajectories * (self.drawn_steps + 1)),
        )

    @property
    def drawn_steps(self) -> int:
        """Number of steps drawn from each trajectory, besides the last one."""
        return drawn_steps(self.steps, self.rollout.fraction)


SETTINGS: dict[MethodName, dict[str, Any]] = {
    "residual-db": {},
    "db": {"optimizer": _adamw(5e-3), "flow_learning_rate": 1e-2},
    "adjoint": {"optimizer": _adamw(1e-2)},
    "refl": {"optimizer": _adamw(1e-3)},
    "draft": {"optimizer": _adamw(1e-3), "direct": Direct(k=10)},
    "draft-lv": {"optimizer": _adamw(1e-3)},
    "ddpo": {"optimizer": _adamw(1e-3), "policy_gradient": PolicyGradient(clip=0.1, window=256)},
    "dag": {"optimizer": _adamw(2e-2), "flow_learning_rate": 1e-2},
    "dag-kl": {
        "optimizer": _adamw(2e-2),
        "flow_learning_rate": 1e-2,
        "policy_gradient": PolicyGradient(clip=0.1),
    },
}
"""Method → fields of `AnalyticConfig` that differ from residual ∇-DB's."""


def settings(method: MethodName, **changes: Any) -> AnalyticConfig:
    """The default configuration of `method`, with `changes` of its fields.

    Raises:
        ValueError: the analytic testbed does not have the method.
    """
    require(method in SETTINGS, "method", method, f"is not on the analytic testbed; use {', '.join(SETTINGS)}.")
    return AnalyticConfig(method=method, **copy.deepcopy(SETTINGS[method]) | changes)
