"""The parts of an analytic run: a known diffusion model, its trained networks, and the exact target."""

import math

import torch
from torch import Tensor, nn

from fastnabla.analytic.added_noise import added_variance
from fastnabla.analytic.config import AnalyticConfig
from fastnabla.analytic.exact_flow import ExactFlow
from fastnabla.analytic.networks import MixtureNetwork, PerceptronFlow
from fastnabla.analytic.prior import reward_for_method
from fastnabla.analytic.problems import PROBLEMS
from fastnabla.analytic.scheduler import alpha_bars, noise_scheduler
from fastnabla.config.methods import METHODS
from fastnabla.methods.registry import STEPS
from fastnabla.models.build import Networks
from fastnabla.models.conditions import Conditions
from fastnabla.models.decoder import Decoder
from fastnabla.models.policy import Policy
from fastnabla.objective.balance import reward_weight
from fastnabla.optim.optimizer import Optimizer
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.draws import DRAWS
from fastnabla.trajectories.rollout import sample
from fastnabla.trajectories.sources import Source, StoredTrajectories, UnsampledTrajectories, reverse_factors
from fastnabla.transition import TransitionTable
from fastnabla.utils.seeding import seed_of

PROMPTS = ("",)
"""A single prompt, which nothing depends on."""


class IdentityDecoder(Decoder):
    """A `fastnabla.models.decoder.Decoder` without an autoencoder: the state is the image."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.chunk = None

    def forward(self, latents: Tensor) -> Tensor:
        """Return `latents`."""
        return latents


class Experiment:
    """The objects that the training loop works on.

    `policy`, `flow`, `decoder`, `table`, `step`, `buffer`, `source` and `optimizer` have the same roles as in
    `fastnabla.training.trainer.Trainer`, and the same classes except for the networks.

    `reference` and `target` are the exact distributions of finished samples before and after finetuning. `reference` is the
    mixture with the noise that is left at the end of the sampler, and that `min_sigma` adds. `target` is its tilt by β/λ
    times γ at the end. `reward` is the problem's reward; `method_reward` is the reward that the method sees.

    Args:
        config: configuration of the run.

    Raises:
        ValueError: the sampler's settings or the number of drawn transitions are invalid, or there is no target.
    """

    def __init__(self, config: AnalyticConfig) -> None:
        problem, training = PROBLEMS[config.dimension](), config.training()
        self.config, self.reward = config, problem.reward

        # The sampler, the exact distributions, and the reward that the method sees.
        alphas = alpha_bars(config.schedule)
        self.table = TransitionTable.from_scheduler(noise_scheduler(config.schedule, config.spacing), config.steps)
        last = self.table.alpha_bar_next[-1]
        # An exact flow is not trained, so its target is known with any λ.
        target_beta = (
            config.objective.beta / config.objective.prior_weight if config.exact_flow else training.target_beta
        )
        if target_beta is None:
            raise ValueError(
                f"objective.prior_weight = {config.objective.prior_weight}: no target is known with it; use 1, or a positive "
                "value with objective.reverse_target = reference."
            )
        beta = target_beta * reward_weight(last, config.objective.gamma).item()
        self.reference = ideal = problem.mixture.diffused(last.item())
        if config.min_sigma is not None:
            unbounded, self.table = self.table, self.table.with_min_sigma(config.min_sigma)
            self.reference = ideal.noised(added_variance(problem.mixture, unbounded, self.table))
        self.target = self.reference.tilted(problem.reward, beta)
        scaled = problem.reward * config.reward_factor
        self.method_reward = reward_for_method(config.method, scaled, self.reference, beta)

        # Policy and flow.
        self.sample_shape = (config.dimension, 1, 1)
        arguments = (problem.mixture, alphas, config.width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(config.seed, "weights"))
            conditions = Conditions(torch.zeros(1 + len(PROMPTS), 1, 1))
            self.policy = Policy(MixtureNetwork(*arguments), conditions, guidance_scale=None, rank=0)
            self.flow = PerceptronFlow(*arguments) if training.has_flow else None
        if config.exact_flow:
            target = self.target if config.min_sigma is None else ideal.before_noise(self.reference, self.target)
            self.flow = ExactFlow(ideal, target, alphas, self.policy.network, self.method_reward, config.objective)
        self.decoder = IdentityDecoder()
        networks = Networks(
            policy=self.policy,
            flow=self.flow,
            decoder=self.decoder,
            gradient_decoder=self.decoder,
            table=self.table,
            sample_shape=self.sample_shape,
        )

        # Training step, source of transitions, and optimizer.
        method, rollout = METHODS[config.method], config.rollout
        self.step = STEPS[config.method].build(training, networks, self.method_reward, PROMPTS)
        self.buffer: TrajectoryBuffer | None = None
        self.source: Source = UnsampledTrajectories(
            config.seed, rollout.trajectories, len(PROMPTS), updates=rollout.updates
        )
        if method.stores:
            sizes = (rollout.trajectories * (1 + rollout.replay), len(self.table), config.drawn_steps + 1)
            self.buffer = TrajectoryBuffer(*sizes, self.sample_shape)
            if training.caches_reference:
                self.buffer.keep_reference(with_product=training.has_flow and training.objective.reverse_weight > 0)
            slots = torch.arange(rollout.trajectories)
            factors = reverse_factors(config.seed, rollout, config.drawn_steps, training.reverse_fraction)
            self.source = StoredTrajectories(
                self._rollout, self.buffer, slots, training.num_rollouts, rollout.replay, reverse_factors=factors
            )
        learned = None if config.exact_flow else self.flow
        self.optimizer = Optimizer(self.policy, learned, config.optimizer, training.flow, config.updates)

    def _rollout(self, rollout_index: int) -> dict[str, float]:
        """Sample and store a rollout of the current policy. Returns the mean of its rewards."""
        config, count = self.config, self.config.rollout.trajectories
        first = rollout_index * count
        draw = DRAWS[config.rollout.draw]
        steps = draw(seed_of(config.seed, "draws"), first, count, config.steps, config.drawn_steps)
        slots = self.buffer.reserve(steps, torch.zeros(count, dtype=torch.int64))
        finished = self._sample([seed_of(config.seed, "noise", first + i) for i in range(count)], slots)
        rewards = self.method_reward(finished, PROMPTS)
        self.buffer.reward[slots] = torch.where(rewards.isfinite(), rewards, math.inf)
        return {"rollout_reward": self.reward(finished, PROMPTS).mean().item()}

    def evaluation_samples(self) -> Tensor:
        """Finished samples `[N, D]`, float64, of the current policy, from the same noise in all evaluations."""
        seeds = [seed_of(0, "evaluation", i) for i in range(self.config.samples)]
        return self._sample(seeds).flatten(1).double()

    def _sample(self, seeds: list[int], slots: Tensor | None = None) -> Tensor:
        prompt = torch.zeros(len(seeds), dtype=torch.int64)
        arguments = (self.policy, self.table, prompt, seeds, self.sample_shape)
        buffer = None if slots is None else self.buffer
        return sample(*arguments, batch=self.config.rollout.batch, buffer=buffer, slots=slots)
