"""The training step: gradients of residual ∇-DB over a batch of transitions, in few network passes.

U is one pass (forward, or backward to the input or to the parameters) of the UNet over a transition's guided rows.

| pass                                          | inner, look-ahead | inner, detached | inner, terminal | last |
|-----------------------------------------------|-------------------|-----------------|-----------------|------|
| reference at x                                | 1                 | 1               | 1               | 1    |
| its vector-Jacobian product (ρ > 0)           | 1                 | 1               | 1               |      |
| policy at x                                   | 1                 | 1               | 1               | 1    |
| its vector-Jacobian product (ρ > 0)           | 1                 | 1               | 1               |      |
| policy at x'                                  | 1                 | 1               |                 |      |
| its vector-Jacobian product                   | 1                 |                 |                 |      |
| backward to the parameters                    | 1                 | 1               | 1               | 1    |
| **U**                                         | **7**             | **6**           | **5**           | **3**|

Transitions are rows of one batch: inner ones and last ones are cut into micro-batches by memory, and their
gradients add up to the same sum whatever the cut.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fastnabla.batch import Transitions
from fastnabla.decoder import Decoder, RewardFunction
from fastnabla.objective.backend import Backend, select
from fastnabla.objective.balance import Gamma, Weighting, Weights
from fastnabla.objective.gaussian import full, guide, unguide
from fastnabla.policy import Policy
from fastnabla.transition import TransitionRows, TransitionTable

Guidance = Literal["lookahead", "lookahead_detached", "terminal"]
STATISTICS = ("trust", "norm_ref", "norm_residual", "norm_reward", "norm_target", "max_residual")


@dataclasses.dataclass(kw_only=True, slots=True)
class Objective:
    """Residual ∇-DB and its weights."""

    beta: float = 1000.0
    """β, the reward scale: the target distribution is p_ref · exp(β r). ≥ 0."""
    guidance: Guidance = "lookahead"
    """Where ∇r is taken. "lookahead": at the one-step prediction of the clean sample, through the UNet (the paper).
    "lookahead_detached": the same without the UNet's Jacobian; one pass less, a biased direction at high noise.
    "terminal": at the finished sample, once per trajectory; two passes and nearly all decodes less, but every step
    is pushed along one and the same gradient."""
    gamma: Gamma = "alpha_bar"
    """γ, weight of the reward score by signal share ᾱ: "alpha_bar" (the paper), "sqrt_alpha_bar" or "constant"."""
    weighting: Weighting = "score"
    """Units of the residuals. "score": as they are, 1/σ (the paper; late steps dominate). "sigma": times the
    step's σ, so that every step counts in units of its own noise."""
    strength: float = 1.0
    """λ, the weight of the pretrained policy's score. ≥ 0; 1 keeps the prior as it is."""
    reverse: float = 1.0
    """ρ, weight of the reverse residual, which trains the flow network. ≥ 0; 0 saves two passes."""
    trust_region: float = 1000.0
    """κ, weight of the squared distance to the outputs of the policy that sampled. ≥ 0. It acts from the second
    update of a rollout on: in the first the two policies are the same."""

    def __post_init__(self) -> None:
        for name in ("beta", "strength", "reverse", "trust_region"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"objective.{name} = {value}: must be finite and not negative.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a training step did; the tensors are on the device."""

    losses: dict[str, Tensor]
    """Scalars: "loss" and its weighted parts "forward", "reverse", "terminal", "trust_region"."""
    rows: dict[str, Tensor]
    """By transition, `[M]`: the `STATISTICS` of `ForwardBalance`, "loss_forward" and "step_index"."""
    passes_inner: float
    """U per inner transition (nan if there is none)."""
    passes_last: float
    """U per last transition (nan if there is none)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RewardScores:
    """Gradients of the unscaled reward, `[N, …]`, as far as a micro-batch needs them."""

    after: Tensor
    """∇r(x')."""
    before: Tensor | None = None
    """∇r(x), where it is known without the UNet's Jacobian;"""
    clean: Tensor | None = None
    """else ∂r/∂x̂0 at the prediction from x."""


class BalanceStep:
    """Accumulates the gradients of the objective over batches of transitions.

    Args:
        policy: the LoRA'd UNet.
        flow: g_φ, or None for g ≡ 0, which also leaves nothing for the reverse residual to train.
        decoder: latents to images.
        reward: images `[B, 3, H, W]` and B prompts to `[B]`.
        prompts: texts of the prompt numbers.
        table: the sampler.
        objective: the weights.
        micro_batch: most transitions in one network pass.
        backend: what computes between the network passes; see `fastnabla.objective.backend`.
    """

    def __init__(
        self,
        policy: Policy,
        flow: nn.Module | None,
        decoder: Decoder,
        reward: RewardFunction,
        prompts: Sequence[str],
        table: TransitionTable,
        objective: Objective,
        micro_batch: int,
        backend: Backend = "auto",
    ) -> None:
        self.policy, self.flow, self.decoder, self.reward = policy, flow, decoder, reward
        self.prompts, self.table, self.objective, self.micro_batch = prompts, table, objective, micro_batch
        self.kernels = select(backend, policy.conditions.device)
        self.weights = Weights(
            guidance_scale=policy.guidance_scale,
            beta=objective.beta,
            gamma=objective.gamma,
            strength=objective.strength,
            weighting=objective.weighting,
            trust_region=objective.trust_region,
        )
        self.parameters = policy.trainable() + (list(flow.parameters()) if flow is not None else [])

    def __call__(self, transitions: Transitions, total: int | None = None) -> StepReport:
        """Add the gradients of the mean loss over `transitions` to the parameters' `.grad`.

        Args:
            transitions: in any order; with terminal guidance, each trajectory's last one among them.
            total: what sums over transitions are divided by, if the batch goes on in other calls.

        Raises:
            ValueError: terminal guidance, and a trajectory's last transition is not in the batch.
        """
        total = total or len(transitions)
        is_last = transitions.step_index == len(self.table) - 1
        terminal_score = None
        if self.objective.guidance == "terminal":
            if not bool(torch.isin(transitions.trajectory, transitions.trajectory[is_last]).all()):
                raise ValueError(
                    "objective.guidance = 'terminal' needs the last transition of every trajectory in the batch; "
                    "gather whole trajectories, or use another guidance."
                )
            terminal_score = self._terminal_scores(transitions[is_last])

        sums: dict[str, list[Tensor]] = {name: [] for name in ("forward", "reverse", "terminal", "trust_region")}
        rows: dict[str, list[Tensor]] = {name: [] for name in ("loss_forward", "step_index", *STATISTICS)}
        passes = []
        for last, group in ((False, transitions[~is_last]), (True, transitions[is_last])):
            before = self.policy.passes.rows
            for start in range(0, len(group), self.micro_batch):
                part = group[start : start + self.micro_batch]
                guide_score = None if terminal_score is None else terminal_score[part.trajectory]
                self._micro_step(part, last, total, guide_score, sums, rows)
            passes.append((self.policy.passes.rows - before) / len(group) if len(group) else float("nan"))

        losses = {name: torch.stack(parts).sum() if parts else self._zero() for name, parts in sums.items()}
        losses["loss"] = torch.stack(list(losses.values())).sum()
        return StepReport(
            losses=losses,
            rows={name: torch.cat(parts) for name, parts in rows.items()},
            passes_inner=passes[0],
            passes_last=passes[1],
        )

    def _micro_step(
        self,
        batch: Transitions,
        last: bool,
        total: int,
        terminal_score: Tensor | None,
        sums: dict[str, list[Tensor]],
        statistics: dict[str, list[Tensor]],
    ) -> None:
        objective, policy, kernels = self.objective, self.policy, self.kernels
        with_reverse = not last and self.flow is not None and objective.reverse > 0
        row = self.table.rows(batch.step_index, batch.x)
        x = batch.x.detach().requires_grad_(with_reverse)

        with torch.set_grad_enabled(with_reverse):
            output_ref = policy.reference(x, row.timestep, batch.prompt)
        output = policy(x, row.timestep, batch.prompt)
        reward = self._reward_scores(batch, row, output, last, with_reverse, terminal_score)
        flow, flow_next = self._flow_scores(batch, row, with_reverse)

        states = (batch.x, batch.x_next, row)
        forward = kernels.forward_balance(
            output, output_ref, *states, reward.after, flow_next, batch.model_output, weights=self.weights
        )
        loss = forward.loss
        parts = {"forward": forward.forward, "trust_region": objective.trust_region * forward.trust}
        if last and self.flow is not None:
            parts["terminal"] = forward.terminal
        if with_reverse:
            outputs = (output.detach(), output_ref.detach())
            through_unet = reward.clean if objective.guidance == "lookahead" else None
            cotangent, cotangent_ref = kernels.reverse_cotangents(*outputs, *states, through_unet, weights=self.weights)
            (vjp,) = torch.autograd.grad(output, x, cotangent, retain_graph=True)
            (vjp_ref,) = torch.autograd.grad(output_ref, x, cotangent_ref)
            reverse = kernels.reverse_balance(
                vjp, vjp_ref, row, flow, reward.before, reward.clean, outputs, weights=self.weights
            )
            loss = loss + objective.reverse * reverse
            parts["reverse"] = objective.reverse * reverse.detach()

        loss.sum().div(total).backward(inputs=self.parameters)
        for name, values in parts.items():
            sums[name].append(values.sum() / total)
        statistics["loss_forward"].append(forward.forward)
        statistics["step_index"].append(batch.step_index)
        for name in STATISTICS:
            statistics[name].append(getattr(forward, name))

    def _reward_scores(
        self,
        batch: Transitions,
        row: TransitionRows,
        output: Tensor,
        last: bool,
        with_reverse: bool,
        terminal_score: Tensor | None,
    ) -> "RewardScores":
        policy = self.policy
        if terminal_score is not None:
            return RewardScores(after=terminal_score, before=terminal_score)
        if last:
            _, gradient = self._reward_gradient(batch.x_next, batch.prompt)
            return RewardScores(after=gradient)

        through_unet = self.objective.guidance == "lookahead"
        x_next = batch.x_next.detach().requires_grad_(through_unet)
        with torch.set_grad_enabled(through_unet):
            output_next = policy(x_next, row.timestep_next, batch.prompt)
        o_next = guide(output_next.detach(), policy.guidance_scale)
        clean = row.c_next * batch.x_next + row.d_next * o_next
        prompt = batch.prompt
        if with_reverse:
            o = guide(output.detach(), policy.guidance_scale)
            clean, prompt = torch.cat([row.c * batch.x + row.d * o, clean]), torch.cat([prompt, prompt])
        _, gradient = self._reward_gradient(clean, prompt)
        gradient, gradient_next = gradient.chunk(2) if with_reverse else (None, gradient)

        score_next = row.c_next * gradient_next
        if through_unet:
            cotangent = unguide(row.d_next * gradient_next, policy.guidance_scale).to(output_next.dtype)
            (vjp,) = torch.autograd.grad(output_next, x_next, cotangent)
            score_next = score_next + full(vjp)
        return RewardScores(after=score_next, clean=gradient)

    def _flow_scores(
        self, batch: Transitions, row: TransitionRows, with_reverse: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """g(x) and g(x') in one call; g(x) only where the reverse residual needs it."""
        if self.flow is None:
            return None, None
        embeddings = self.policy.conditions[batch.prompt + 1]
        if not with_reverse:
            return None, self.flow(batch.x_next, row.timestep_next, embeddings)
        states = torch.cat([batch.x, batch.x_next])
        timesteps = torch.cat([row.timestep, row.timestep_next])
        return self.flow(states, timesteps, torch.cat([embeddings, embeddings])).chunk(2)

    def _terminal_scores(self, last: Transitions) -> Tensor:
        """∇r(x_T) by buffer slot `[slots, C, H, W]`, one reward gradient per trajectory."""
        slots, first = _first_of_each(last.trajectory)
        scores = last.x_next.new_zeros(int(slots.max()) + 1, *last.x_next.shape[1:])
        for part in torch.arange(len(slots)).split(self.micro_batch):
            rows = first[part]
            _, scores[slots[part]] = self._reward_gradient(last.x_next[rows], last.prompt[rows])
        return scores

    def _reward_gradient(self, latents: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder.reward_gradient(latents, [self.prompts[i] for i in prompt.tolist()], self.reward)

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.policy.conditions.device)


def _first_of_each(values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct `values`, and for each the position of one occurrence."""
    distinct, inverse = values.unique(return_inverse=True)
    first = torch.empty_like(distinct).scatter_(0, inverse, torch.arange(len(values), device=values.device))
    return distinct, first
