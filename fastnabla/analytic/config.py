"""The configuration of an analytic run. Every field's text is its `--help`."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from fastnabla.config.sections import FlowConfig, MemoryConfig, OptimizerConfig, RolloutConfig, SamplerConfig
from fastnabla.config.train import MethodName, TrainConfig
from fastnabla.objective.direct import Direct
from fastnabla.objective.policy_gradient import PolicyGradient
from fastnabla.objective.settings import Objective


@dataclasses.dataclass(kw_only=True, slots=True)
class AnalyticConfig:
    """Finetune a diffusion model that is known exactly, towards p_ref · exp(β r), which is known exactly too.

    The pretrained model is the score of a Gaussian mixture, and the reward is quadratic, so the target is a mixture as
    well. A perceptron learns the change, by the sampler, buffer, training step and optimizer that finetune Stable
    Diffusion. What the result samples is compared with the target by the masses of the modes and by the sliced
    Wasserstein distance, each beside its Monte-Carlo floor: what as many exact draws would show.

    docs/analytic.md tells what each setting does here. Try --objective.reverse_weight 1, --flow-learning-rate 0, or
    --objective.reward_gradient terminal.
    """

    method: MethodName = "residual-db"
    """As for `python -m fastnabla.train`, and by the same training step. It decides the defaults of the other fields; see
    them by --method NAME --help."""
    dimension: Literal[2, 16] = 2
    """2: four modes on a ring. 16: six random modes."""
    updates: int = 3200
    """Optimizer updates."""
    seed: int = 0
    """Seed of the training. Evaluations have noise of their own, the same for all seeds."""
    run: Path | None = None
    """Folder for everything the run writes; must not exist. None: the next free runs/analytic-2d-residual-db-001, …"""
    steps: int = 50
    """T, steps of the sampler. They all change the signal-to-noise ratio by one factor."""
    width: int = 128
    """Width of the two perceptrons' hidden layers."""
    flow_learning_rate: float = 3e-3
    """Step size for the flow network of methods that have one; 0 leaves it out (flow.kind = "none"), and with it the reverse
    residual: ∇log F is then the look-ahead guess alone."""
    exact_flow: bool = False
    """Let residual ∇-DB know ∇log F, in place of g_φ and the reverse residual that trains it: what is left then is the policy's
    error, and the sampler's."""
    reward_factor: float = 1.0
    """The method is told so many times the reward, while the target stays: to see what a wrong scale does, or below 0 a
    wrong sign."""
    evaluate_every: int = 400
    """Updates between evaluations."""
    samples: int = 4096
    """Samples of an evaluation: the more, the lower the Monte-Carlo floor, and the smaller the errors that show."""
    objective: Objective = dataclasses.field(
        default_factory=lambda: Objective(beta=0.6, reverse_weight=300.0, trust_region_weight=0.0)
    )
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-2, beta2=0.95, weight_decay=0.0, schedule="cosine")
    )
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
            raise ValueError(f"flow_learning_rate = {self.flow_learning_rate}: must be finite, and not negative.")
        if self.optimizer.ema is not None:
            raise ValueError(
                f"optimizer.ema = {self.optimizer.ema}: the analytic testbed measures the weights themselves; leave it None."
            )
        drawn, strata = self.drawn_steps, self.rollout.draw == "stratified"
        if drawn < 1 or (self.steps % drawn if strata else drawn >= self.steps):
            raise ValueError(
                f"rollout.fraction = {self.rollout.fraction}: of steps = {self.steps} gives {drawn}, which must be "
                f"{'a positive divisor of steps' if strata else 'positive and less than steps'}; change either."
            )
        if not math.isfinite(self.reward_factor):
            raise ValueError(f"reward_factor = {self.reward_factor}: must be finite.")
        if self.exact_flow and (self.method, self.objective.reward_gradient) != ("residual-db", "lookahead"):
            raise ValueError(
                f"exact_flow = True: is for method = residual-db with objective.reward_gradient = lookahead, not {self.method!r} with "
                f"{self.objective.reward_gradient!r}; change these, or leave it out."
            )
        self.training()

    def training(self) -> TrainConfig:
        """What `fastnabla.methods.registry` builds the step of.

        Raises:
            ValueError: the settings do not suit the method.
        """
        rate, objective = self.flow_learning_rate, self.objective
        if self.exact_flow:
            objective = dataclasses.replace(objective, reverse_weight=0.0)
        return TrainConfig(
            method=self.method,
            updates=self.updates,
            seed=self.seed,
            sampler=SamplerConfig(steps=self.steps, guidance_scale=1.0),
            objective=objective,
            direct=self.direct,
            policy_gradient=self.policy_gradient,
            rollout=self.rollout,
            flow=FlowConfig(learning_rate=rate, weight_decay=0.0) if rate else FlowConfig(kind="none"),
            optimizer=self.optimizer,
            memory=MemoryConfig(micro_batch=self.rollout.trajectories * (self.drawn_steps + 1)),
        )

    @property
    def drawn_steps(self) -> int:
        """Steps drawn from each trajectory besides the last."""
        return int(self.steps * self.rollout.fraction + 1e-9)
