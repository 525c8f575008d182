"""The training step of methods that take the reward's gradient through the sampler: ReFL, DRaFT-K, DRaFT-LV, AlignProp.

All maximise ``E[r(x_T)]`` itself. They differ in how much of the sampler the gradient passes through. x_i is the state
before step i of T; [brackets] carry no gradient:

| ending                                | rewarded latents                                                     | U per trajectory |
|---------------------------------------|----------------------------------------------------------------------|------------------|
| `late_prediction` (ReFL)              | x̂0([x_i]) = c [x_i] + d o_θ([x_i]), i uniform among the late steps   | i + 2; half      |
|                                       |                                                                      | without guidance |
| `last_steps` (DRaFT-K)                | x_T, by x' = a x + b o_θ(x) + σ ε from [x_{T−K}] on                  | T + K; T + 2 K   |
|                                       |                                                                      | with a penalty   |
| `last_step_redrawn` (DRaFT-LV)        | x_T, by the last step from [x_{T−1}]; and x', by the last step from  | T + 1 + 2 n      |
|                                       | each of n draws of x ~ q(x_{T−1} given [x_T])                        |                  |

ReFL is from Xu et al., arXiv 2304.05977, algorithm 1. Here their map φ of the reward is the identity, and there is no
pretraining loss. DRaFT is from Clark et al., arXiv 2309.17400, sections 3 and 3.2. DRaFT-LV noises the finished sample
back to the noise level of the last step's state with DDPM's noising kernel, for any η of the sampler, because DDIM's
marginals do not depend on η. Each of the n redraws then samples the last step again. The paper adds up the gradients of the
sample and of its n redraws (algorithm 1). Here the loss is their mean, so that its scale does not depend on n.

AlignProp (Prabhudesai et al., arXiv 2310.03739) is DRaFT-K with a random K, here one for each update.

The loss is ``−mean r``. DRaFT-K can add DRaFT+'s penalty (NVIDIA NeMo-Aligner, `megatron_sd_draftp_model.py`), which costs one U
more for each differentiated step:

    κ · mean (ε_θ(x_i) − [ε_ref(x_i)])²    over the K differentiated steps, trajectories and elements; ε as guided

Times a factor of the step, which is left out, this is the KL divergence of the two policies' steps. As in NeMo-Aligner, x_i
keeps its gradient in ε_θ, but ε_ref is a constant. So for K > 1 the gradient is that of the penalty but for the terms with
∂ε_ref/∂x_i; for K = 1 there are none.

The decoder's graph is never joined to the UNet's: ∂r/∂x is computed in chunks of images, and one backward pass carries it
into the sampler. So the memory is that of K (or n + 1) UNet graphs.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnabla.methods.accumulation import PartResult, StepReport
from fastnabla.methods.sampling import Sampling, SamplingStep
from fastnabla.methods.zero_gradients import DRIVE, REWARD_GRADIENT, largest
from fastnabla.models.decoder import Decoder, RewardFunction
from fastnabla.models.policy import Policy
from fastnabla.objective.gaussian import guide
from fastnabla.objective.noising import renoise
from fastnabla.objective.ops import PLAIN
from fastnabla.objective.settings import Backend
from fastnabla.trajectories.reward_statistics import reward_statistics
from fastnabla.trajectories.rollout import advance
from fastnabla.trajectories.sources import Trajectories
from fastnabla.transition import TransitionTable

Ending = Callable[[Sampling], tuple[Tensor, Tensor | None]]
"""Finishes the sampling. Returns the rewarded latents `[m n, C, H, W]`, m times all n trajectories; and the penalty `[n]`, or
None. Both have their graphs."""


def last_steps(k: int, random: bool = False, penalised: bool = False) -> Ending:
    """DRaFT-K: the finished samples, with a gradient through the last `k` steps.

    Args:
        k: K.
        random: draw K uniformly from 1 to `k` for each update, as in AlignProp.
        penalised: return the mean of (ε_θ − ε_ref)² over the K steps and the elements too.
    """

    def ending(sampling: Sampling) -> tuple[Tensor, Tensor | None]:
        num_steps = len(sampling.table)
        through, penalties = random_k(sampling.shared, k) if random else k, []
        sampling.walk(num_steps - through)
        for _ in range(through):
            x, step = sampling.x, sampling.step
            output = sampling.take(gradient=True)
            if penalised:
                penalties.append(_deviation(sampling, step, x, output))
        return sampling.x, torch.stack(penalties).mean(0) if penalised else None

    return ending


def random_k(seed: int, k: int) -> int:
    """A number from 1 to `k`, drawn uniformly by `seed`."""
    return int(torch.randint(1, k + 1, (), generator=torch.Generator().manual_seed(seed)))


def _deviation(sampling: Sampling, step: int, x: Tensor, output: Tensor) -> Tensor:
    """The mean of (ε_θ − ε_ref)² over the elements, `[n]`.

    Args:
        sampling: gives policy and prompts.
        step: number of the step.
        x: states before it, `[n, C, H, W]`.
        output: the policy's guided outputs there, with their graph.
    """
    policy = sampling.policy
    row = sampling.table.rows(torch.full((len(x),), step, device=x.device), x)
    with torch.no_grad():
        output_ref = guide(policy.reference(x, row.timestep, sampling.prompt), policy.guidance_scale)
    # ε = (x − √ᾱ x̂0) / n with x̂0 = c x + d o; for ε-prediction this factor is −1.
    factor = row.d * row.alpha_bar.sqrt() / row.noise_std
    return (factor * (output - output_ref)).square().flatten(1).mean(1)


def last_step_redrawn(redraws: int) -> Ending:
    """DRaFT-LV: the last step of the trajectory, and of `redraws` states that are redrawn from the finished sample."""

    def ending(sampling: Sampling) -> tuple[Tensor, None]:
        last, noise = len(sampling.table) - 1, sampling.noise
        sampling.walk(last)
        sampling.walk(last + 1, gradient=True)
        finished = sampling.x.detach()
        row = sampling.table.rows(torch.full((len(finished),), last, device=finished.device), finished)
        x = torch.cat([renoise(finished, noise.draw(), row) for _ in range(redraws)])
        steps, prompt = torch.cat([noise.draw() for _ in range(redraws)]), sampling.prompt.repeat(redraws)
        redrawn, _ = advance(sampling.policy, sampling.table, PLAIN, last, x, steps, prompt)
        return torch.cat([sampling.x, redrawn]), None

    return ending


def late_prediction(first: int, guidance_scale: float | None = None) -> Ending:
    """ReFL: the clean sample predicted at a step drawn uniformly from `first` on, independently for each trajectory.

    Args:
        first: the first late step.
        guidance_scale: w of the walk and of the prediction, 1 for no guidance; None for the policy's.
    """

    def ending(sampling: Sampling) -> tuple[Tensor, None]:
        policy, num_steps = sampling.policy, len(sampling.table)
        stops = torch.tensor([late_step(seed, first, num_steps) for seed in sampling.draws])
        with policy.guided(guidance_scale):
            sampling.walk_each(stops)
            x = sampling.x
            row = sampling.table.rows(stops.to(x.device, non_blocking=True), x)
            output = policy(x, row.timestep, sampling.prompt)
            return row.c * x + row.d * guide(output, policy.guidance_scale), None

    return ending


def late_step(seed: int, first: int, num_steps: int) -> int:
    """A step from `first` to `num_steps` − 1, drawn uniformly by `seed`."""
    return int(torch.randint(first, num_steps, (), generator=torch.Generator().manual_seed(seed)))


class DirectStep(SamplingStep):
    """Samples trajectories and accumulates the gradients of their rewards.

    Its reports have the losses "reward" and, with a penalty, "kl". By row they have the "reward" whose gradient is taken, "norm_reward", which is ‖∇r‖
    in the latents, and, on the host, "prompt".

    Args:
        policy, decoder, reward, prompts, table, sample_shape, micro_batch, backend: as for `SamplingStep`.
        ending: what is rewarded, and how far the gradient goes.
        kl: κ, weight of the ending's penalty; 0 if it has none.
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
        kl: float = 0.0,
    ) -> None:
        super().__init__(policy, decoder, reward, prompts, table, sample_shape, micro_batch, backend)
        self.ending, self.kl = ending, kl

    def __call__(self, trajectories: Trajectories, total: int | None = None) -> StepReport:
        """As `SamplingStep`."""
        with self.policy.whole_reference() if self.kl else contextlib.nullcontext():
            return super().__call__(trajectories, total)

    def gradients(self, trajectories: Trajectories, total: int) -> PartResult:
        """As `SamplingStep.gradients`: those of ``−mean r``, plus the weighted penalty."""
        latents, penalty = self.ending(self._sampling(trajectories))
        times = len(latents) // len(trajectories)
        rewards, score = self._reward_gradient(latents.detach(), trajectories.prompt.repeat(times))
        loss = -(latents * score).sum() / (total * times)
        by_row = rewards.view(times, -1).mean(0)
        losses = {"reward": -by_row.sum() / total}
        if penalty is not None:
            weighted = self.kl * penalty.sum() / total
            loss, losses["kl"] = loss + weighted, weighted.detach()
        gradients = self._differentiate(loss)
        norm_reward = score.flatten(1).norm(dim=1).view(times, -1).mean(0)
        rows = {"reward": by_row, "norm_reward": norm_reward, "prompt": trajectories.prompt}
        return PartResult(gradients=gradients, losses=losses, rows=rows)

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return reward_statistics(rows["reward"]) | {"norm_reward": rows["norm_reward"].mean()}

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict.fromkeys((DRIVE, REWARD_GRADIENT), largest(rows["norm_reward"]))
