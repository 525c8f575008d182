"""The training step of methods that take the reward's gradient through the sampler: ReFL, DRaFT-K, DRaFT-LV.

All maximise ``E[r(x_T)]`` itself. They differ in how much of the sampler the gradient passes through. x_i is the state
before step i of T; [brackets] carry no gradient:

| ending                                | rewarded latents                                                     | U per trajectory |
|---------------------------------------|----------------------------------------------------------------------|------------------|
| `late_prediction` (ReFL)              | x̂0([x_i]) = c [x_i] + d o_θ([x_i]), i uniform among the late steps   | i + 2            |
| `last_steps` (DRaFT-K)                | x_T, by x' = a x + b o_θ(x) + σ ε from [x_{T−K}] on                  | T + K            |
| `last_step_redrawn` (DRaFT-LV)        | x_T, by the last step from [x_{T−1}]; and x', by the last step from  | T + 1 + 2 n      |
|                                       | each of n draws of x ~ q(x_{T−1} given [x_T])                        |                  |

ReFL is from Xu et al., arXiv 2304.05977, algorithm 1. Here their map φ of the reward is the identity, and there is no
pretraining loss. DRaFT is from Clark et al., arXiv 2309.17400, sections 3 and 3.2. DRaFT-LV noises the finished sample
back to the noise level of the last step's state with DDPM's noising kernel, for any η of the sampler, because DDIM's
marginals do not depend on η. Each of the n redraws then samples the last step again. The paper adds up the gradients of the
sample and of its n redraws (algorithm 1). Here the loss is their mean, so that its scale does not depend on n.

The loss is ``−mean r``. The decoder's graph is never joined to the UNet's: ∂r/∂x is computed in chunks of images, and one
backward pass carries it into the sampler. So the memory is that of K (or n + 1) UNet graphs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnabla.methods.accumulation import PartResult
from fastnabla.methods.sampling import Sampling, SamplingStep, reward_statistics
from fastnabla.methods.zero_gradients import DRIVE, REWARD_GRADIENT, largest
from fastnabla.models.decoder import Decoder, RewardFunction
from fastnabla.models.policy import Policy
from fastnabla.objective.gaussian import guide
from fastnabla.objective.noising import renoise
from fastnabla.objective.ops import PLAIN
from fastnabla.objective.settings import Backend
from fastnabla.trajectories.rollout import advance
from fastnabla.trajectories.sources import Trajectories
from fastnabla.transition import TransitionTable

Ending = Callable[[Sampling], Tensor]
"""Finishes the sampling and returns the rewarded latents with their graph, `[m n, C, H, W]`: m times all n trajectories."""


def last_steps(k: int) -> Ending:
    """DRaFT-K: the finished samples, with a gradient through the last `k` steps."""

    def ending(sampling: Sampling) -> Tensor:
        num_steps = len(sampling.table)
        sampling.walk(num_steps - k)
        sampling.walk(num_steps, gradient=True)
        return sampling.x

    return ending


def last_step_redrawn(redraws: int) -> Ending:
    """DRaFT-LV: the last step of the trajectory, and of `redraws` states that are redrawn from the finished sample."""

    def ending(sampling: Sampling) -> Tensor:
        last, noise = len(sampling.table) - 1, sampling.noise
        sampling.walk(last)
        sampling.walk(last + 1, gradient=True)
        finished = sampling.x.detach()
        row = sampling.table.rows(torch.full((len(finished),), last, device=finished.device), finished)
        x = torch.cat([renoise(finished, noise.draw(), row) for _ in range(redraws)])
        steps, prompt = torch.cat([noise.draw() for _ in range(redraws)]), sampling.prompt.repeat(redraws)
        redrawn, _ = advance(sampling.policy, sampling.table, PLAIN, last, x, steps, prompt)
        return torch.cat([sampling.x, redrawn])

    return ending


def late_prediction(first: int) -> Ending:
    """ReFL: the clean sample predicted at a step drawn uniformly from `first` on, independently for each trajectory."""

    def ending(sampling: Sampling) -> Tensor:
        policy, num_steps = sampling.policy, len(sampling.table)
        stops = torch.tensor([late_step(seed, first, num_steps) for seed in sampling.draws])
        sampling.walk_each(stops)
        x = sampling.x
        row = sampling.table.rows(stops.to(x.device, non_blocking=True), x)
        output = policy(x, row.timestep, sampling.prompt)
        return row.c * x + row.d * guide(output, policy.guidance_scale)

    return ending


def late_step(seed: int, first: int, num_steps: int) -> int:
    """A step from `first` to `num_steps` − 1, drawn uniformly by `seed`."""
    return int(torch.randint(first, num_steps, (), generator=torch.Generator().manual_seed(seed)))


class DirectStep(SamplingStep):
    """Samples trajectories and accumulates the gradients of their rewards.

    Its reports have the loss "reward". By row they have the "reward" whose gradient is taken, "norm_reward", which is ‖∇r‖
    in the latents, and, on the host, "prompt".

    Args:
        policy, decoder, reward, prompts, table, sample_shape, micro_batch, backend: as for `SamplingStep`.
        ending: what is rewarded, and how far the gradient goes.
    """

    def __init__(
        self,
        policy: Policy,
        decoder: Decoder,
        reward: RewardFunction,
        prompts: Sequence[str],
        table: TransitionTable,
        sample_shape: tuple[int, ...],
        ending: Ending,
        micro_batch: int,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(policy, decoder, reward, prompts, table, sample_shape, micro_batch, backend)
        self.ending = ending

    def gradients(self, trajectories: Trajectories, total: int) -> PartResult:
        """As `SamplingStep.gradients`: those of ``−mean r``."""
        latents = self.ending(self._sampling(trajectories))
        times = len(latents) // len(trajectories)
        rewards, score = self._reward_gradient(latents.detach(), trajectories.prompt.repeat(times))
        gradients = self._differentiate(-(latents * score).sum() / (total * times))
        by_row = rewards.view(times, -1).mean(0)
        norm_reward = score.flatten(1).norm(dim=1).view(times, -1).mean(0)
        rows = {"reward": by_row, "norm_reward": norm_reward, "prompt": trajectories.prompt}
        return PartResult(gradients=gradients, losses={"reward": -by_row.sum() / total}, rows=rows)

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return reward_statistics(rows["reward"]) | {"norm_reward": rows["norm_reward"].mean()}

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict.fromkeys((DRIVE, REWARD_GRADIENT), largest(rows["norm_reward"]))
