"""The training step of residual ∇-DB and ∇-DB: gradients over a batch of transitions, in few network passes.

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

Plain ∇-DB knows its backward policy in closed form: without the first two rows it is 5, 4, 3 and 2 U. So it is in later
inner epochs of residual ∇-DB (`rollout.epochs`): neither row depends on the policy, and both are kept from the first
(`fastnabla.trajectories.reference_cache`). With the reverse
residual's gradient to θ (second order, ρ > 0) an inner transition is also differentiated through the policy's
vector-Jacobian product, which is as much arithmetic as 2 U, and with look-ahead has another product, since the reward's
part is then taken apart: 10, 8 and 7 U.

Transitions are rows of one batch: inner ones and last ones are cut into micro-batches by memory, and their
gradients add up to the same sum whatever the cut. Of L adjacent transitions in a micro-batch, with `share`, only the
last needs a pass at x'; for the others the pass at x of their follower serves, with one more vector-Jacobian product:
6 L + 2 passes and L + 1 decodes (look-ahead) instead of 7 L and 2 L.
"""

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastnabla.methods.accumulation import Accumulation, Share, StepReport
from fastnabla.methods.backward_policy import BackwardPolicy, NoisingKernel, PretrainedReversal
from fastnabla.methods.micro_batches import MicroBatch, cut
from fastnabla.methods.reward_scores import LookAhead, RewardScores, TerminalScores
from fastnabla.methods.zero_gradients import DRIVE, REWARD_GRADIENT, largest
from fastnabla.models.decoder import Decoder, RewardFunction
from fastnabla.models.policy import Policy
from fastnabla.objective import second_order
from fastnabla.objective.settings import Backend, Objective
from fastnabla.trajectories.transitions import Selection, Transitions
from fastnabla.transition import TransitionRows, TransitionTable

ROWS = ("loss_forward", "loss_reverse", "step_index", "prompt")
STATISTICS = ("trust", "norm_ref", "norm_residual", "norm_reward", "norm_target", "max_residual")


class BalanceStep(Accumulation):
    """Accumulates the gradients of the objective over batches of transitions.

    Its reports have the losses "forward", "reverse", "terminal" and "trust_region", by row the `STATISTICS` of
    `ForwardBalance`, "loss_forward", "loss_reverse", "step_index" and, on the host, "prompt", and U by "inner" and "last"
    transition.

    Args:
        policy: the finetuned and the reference network.
        flow: g_φ, or None for g ≡ 0, which also leaves nothing for the reverse residual to train. It computes in
            bfloat16 (autocast) where the policy's dtype has 16 bits.
        decoder: latents to images.
        reward: images `[B, 3, H, W]` and B prompts to `[B]`.
        prompts: texts of the prompt numbers.
        table: the sampler.
        objective: the weights.
        micro_batch: most transitions in one network pass. Running out of the GPU's memory halves it.
        backend: what computes between the network passes; see `fastnabla.objective.backend`.
        share: let adjacent transitions share passes.
        noising: P_B is DDPM's noising kernel (plain ∇-DB), and not the reversal of the pretrained sampler.

    Raises:
        ValueError: passes are to be shared, and a step of `table` does not end where the next begins; the noising
            kernel is asked for, and the steps are not DDPM's; second order is, and the policy's network has no second
            derivatives.
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
        share: bool = False,
        noising: bool = False,
    ) -> None:
        super().__init__(policy, flow, micro_batch, backend)
        self.decoder, self.reward = decoder, reward
        self.prompts, self.table, self.objective = prompts, table, objective
        self.settings = {"objective": objective, "guidance_scale": policy.guidance_scale}
        if share and not table.is_chain():
            raise ValueError("passes are to be shared, but a step of the sampler does not end where the next begins.")
        if objective.reverse_second_order and not policy.twice_differentiable:
            raise ValueError(
                "objective.reverse_second_order = True: networks that are compiled, checkpointed or use xformers' attention "
                "have no second derivatives; set --compute.compile none --memory.checkpoint-unet False --compute.attention sdpa."
            )
        self.share = share
        self.backward_policy: BackwardPolicy = (
            NoisingKernel(table, policy.guidance_scale is not None)
            if noising
            else PretrainedReversal(policy, self.ops, objective)
        )

    def __call__(self, transitions: Transitions | Selection, total: int | None = None) -> StepReport:
        """Add the gradients of the mean loss over `transitions` to the parameters' `.grad`.

        Args:
            transitions: in any order; with terminal guidance, each trajectory's last one among them. A `Selection` is
                gathered one micro-batch at a time.
            total: what sums over transitions are divided by, if the batch goes on in other calls.

        Raises:
            ValueError: terminal guidance, and a trajectory's last transition is not in the batch.
            torch.OutOfMemoryError: not even one transition at a time fits.
        """
        selection = transitions.select() if isinstance(transitions, Transitions) else transitions
        total, num_steps = total or self.world.sum(len(selection)), len(self.table)
        terminal = self._terminal_scores(selection) if self.objective.reward_gradient == "terminal" else None
        with self.policy.whole_reference() if self.backward_policy.passes else contextlib.nullcontext():
            return self._accumulate(
                len(selection),
                lambda rows, size: [part.of(rows) for part in cut(selection[rows], num_steps, size, self.share)],
                lambda micro: self._micro_step(selection, micro, total, terminal),
            )

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        means = {name: rows[name].mean() for name in STATISTICS if name.startswith("norm")}
        return means | {"max_residual": rows["max_residual"].max()}

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        reward = {REWARD_GRADIENT: largest(rows["norm_reward"])} if self.objective.beta > 0 else {}
        return {DRIVE: largest(rows["loss_forward"]), **reward}

    @property
    def path(self) -> str:
        """How gradients are computed, in words."""
        return f"{super().path}, objective.reward_gradient = {self.objective.reward_gradient!r}"

    def _terminal_scores(self, selection: Selection) -> TerminalScores:
        samples = int((selection.step_index == len(self.table) - 1).sum())
        while True:
            size = min(self.micro_batch, samples)
            settings = (selection, len(self.table), self._pixel_gradient, size)
            scores = self._attempt(size, TerminalScores, *settings)
            if scores is not None:
                return scores

    def _micro_step(
        self, selection: Selection, micro: MicroBatch, total: int, terminal: TerminalScores | None
    ) -> Share:
        """The micro-batch's share. One UNet graph is alive at a time: at the next states, of the reference, of the
        policy."""
        # Fused attention has no second derivatives.
        second = self.objective.reverse_second_order
        with sdpa_kernel(SDPBackend.MATH) if second else contextlib.nullcontext():
            return self._compute(selection, micro, total, terminal)

    def _compute(self, selection: Selection, micro: MicroBatch, total: int, terminal: TerminalScores | None) -> Share:
        objective, policy, kernels = self.objective, self.policy, self.ops
        with_reverse = not micro.last and self.flow is not None and objective.reverse_weight > 0
        batch, prompts = selection.gather(micro.rows), selection.prompt[micro.rows]
        row = self.table.rows(batch.step_index, batch.x)
        x, states = batch.x.detach().requires_grad_(), (batch.x, batch.x_next, row)

        ahead = None
        if terminal is not None:
            score = terminal.of(selection.trajectory[micro.rows])
            reward = RewardScores(after=score, before=score)
        elif micro.last:
            reward = RewardScores(after=self._pixel_gradient(batch.x_next, prompts.tolist()))
        else:
            settings = {"through_unet": objective.reward_gradient == "lookahead", "here": with_reverse}
            ahead = LookAhead(policy, self._pixel_gradient, self.table, micro, batch, prompts, **settings)
        cached = None if selection.reference is None else selection.reference[micro.rows]
        output_ref, vjp_ref = self.backward_policy(x, batch, row, with_reverse, cached)
        output = policy(x, row.timestep, batch.prompt)
        if ahead is not None:
            reward = ahead.scores(x, output)
        flow, flow_next = self._flow_scores(micro, batch, row, with_reverse)
        forward = kernels.forward_balance(
            output, output_ref, *states, reward.after, flow_next, batch.model_output, **self.settings
        )
        loss, nothing = forward.loss, torch.zeros_like(forward.forward)
        parts = {
            "forward": forward.forward,
            "reverse": nothing,
            "terminal": forward.terminal if micro.last and self.flow is not None else nothing,
            "trust_region": objective.trust_region_weight * forward.trust,
        }
        if with_reverse:
            through_unet = reward.clean if objective.reward_gradient == "lookahead" else None
            operations = second_order if objective.reverse_second_order else kernels
            vjp = self._vjp(x, output, states, through_unet)
            scores = (reward.before, reward.clean, (output, output_ref))
            reverse = objective.reverse_weight * operations.reverse_balance(
                vjp, vjp_ref, row, flow, *scores, **self.settings
            )
            loss = loss + reverse
            parts["reverse"] = reverse.detach()

        gradients = self._gradients(loss.sum() / total)
        numbers = (parts["forward"], parts["reverse"], batch.step_index, prompts)
        rows = dict(zip(ROWS, numbers, strict=True))
        rows |= {name: getattr(forward, name) for name in STATISTICS}
        losses = {name: values.sum() / total for name, values in parts.items()}
        return Share(gradients=gradients, losses=losses, rows=rows)

    def _vjp(self, x: Tensor, output: Tensor, states: tuple, pixel_score: Tensor | None) -> Tensor:
        """Vector-Jacobian product of the policy: ``λ s̄_θ + ∇R(x)`` but for the direct parts, without ∇R if there is no
        `pixel_score`. The graph of `output` stays."""
        if not self.objective.reverse_second_order:
            cotangent = self.ops.reverse_cotangent(output.detach(), *states, pixel_score, **self.settings)
            (vjp,) = torch.autograd.grad(output, x, cotangent, retain_graph=True)
            return vjp
        cotangent = second_order.score_cotangent(output, *states, **self.settings)
        (vjp,) = torch.autograd.grad(output, x, cotangent, create_graph=True)
        vjp = self.policy.passes.watch_backward(vjp, 2 * len(x))
        if pixel_score is None:
            return vjp
        reward_alone = self.settings | {"objective": dataclasses.replace(self.objective, prior_weight=0.0)}
        cotangent = self.ops.reverse_cotangent(output.detach(), *states, pixel_score, **reward_alone)
        return vjp + torch.autograd.grad(output, x, cotangent, retain_graph=True)[0]

    def _flow_scores(
        self, micro: MicroBatch, batch: Transitions, row: TransitionRows, with_reverse: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """g(x) and g(x') in one call, each state once; g(x) only where the reverse residual needs it."""
        if self.flow is None:
            return None, None
        states, timesteps, prompt = batch.x_next, row.timestep_next, batch.prompt
        if with_reverse:
            tails = micro.tails.to(states.device, non_blocking=True)
            states = torch.cat([batch.x, states[tails]])
            timesteps, prompt = torch.cat([row.timestep, timesteps[tails]]), torch.cat([prompt, prompt[tails]])
        scores = self._flow_values(states, timesteps, prompt)
        if not with_reverse:
            return None, scores
        return scores[: len(batch)], scores[micro.after().to(states.device, non_blocking=True)]

    def _pixel_gradient(self, latents: Tensor, prompts: Sequence[int]) -> Tensor:
        return self.decoder.reward_gradient(latents, [self.prompts[i] for i in prompts], self.reward)[1]
