"""Residual ∇-DB and plain ∇-DB (arXiv 2412.07775): the gradients of a batch of transitions, in few network passes.

`BalanceStep.gradients` computes one micro-batch, term by term: reference, policy, reward scores, forward residual, reverse
residual. `fastnabla/objective/README.md` derives the terms, and `fastnabla.methods.passes` has the table of the passes.

Transitions of all steps are rows of one batch. Inner and last transitions are cut into micro-batches that fit into memory;
the sum of their gradients does not depend on the cut. Adjacent transitions can share passes (`reuse_passes`): the next
state of one is the state of the other.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastnabla.methods.accumulation import Accumulation, PartResult, Parts, StepReport
from fastnabla.methods.micro_batches import MicroBatch, cut
from fastnabla.methods.reward_scores import RewardScores, predicted_scores, terminal_scores, unshared_scores
from fastnabla.methods.zero_gradients import DRIVE, REWARD_GRADIENT, largest
from fastnabla.models.decoder import Decoder, RewardFunction
from fastnabla.models.policy import Policy
from fastnabla.objective import second_order
from fastnabla.objective.balance import ForwardBalance
from fastnabla.objective.gaussian import guide
from fastnabla.objective.noising import check_is_ddpm, noising_output, noising_reverse
from fastnabla.objective.settings import Backend, Objective, ReverseTarget
from fastnabla.trajectories.reference_cache import CachedRows
from fastnabla.trajectories.transitions import LazyTransitions, Transitions
from fastnabla.transition import TransitionRows, TransitionTable

ROWS = ("loss_forward", "loss_reverse", "step_index", "prompt")
STATISTICS = ("trust", "norm_ref", "norm_residual", "norm_reward", "norm_target", "max_residual")


class BalanceStep(Accumulation):
    """Accumulates the gradients of the objective over batches of transitions.

    Its reports have the losses "forward", "reverse", "terminal" and "trust_region". By row they have the `STATISTICS` of
    `ForwardBalance`, "loss_forward", "loss_reverse", "step_index" and, on the host, "prompt". U is by "inner" and "last"
    transition.

    Args:
        policy: the finetuned and the reference network.
        flow: g_φ, or None for g ≡ 0, which leaves nothing for the reverse residual to train. It computes in bfloat16
            (autocast) if the policy's dtype has 16 bits.
        decoder: latents to images.
        reward: images `[B, 3, H, W]` and B prompts to `[B]`.
        prompts: the texts, by prompt number.
        table: the sampler.
        objective: the settings.
        micro_batch: maximum number of transitions in one network pass. Running out of GPU memory halves it.
        backend: what computes between the network passes; see `fastnabla.objective.backend`.
        reuse_passes: let adjacent transitions share passes.
        noising: P_B is DDPM's noising kernel (plain ∇-DB), instead of the reversal of the pretrained sampler.

    Raises:
        ValueError: `reuse_passes`, and a step of `table` does not end where the next begins; `noising`, and the steps are
            not DDPM's; second order, and the policy's network has no second derivatives; another step computes
            `objective.reverse_target`.
    """

    reverse_target: ReverseTarget = "policy"
    """The `objective.reverse_target` that this step computes."""

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
        reuse_passes: bool = False,
        noising: bool = False,
    ) -> None:
        super().__init__(policy, flow, micro_batch, backend)
        self.decoder, self.reward = decoder, reward
        self.prompts, self.table, self.objective = prompts, table, objective
        self.reuse_passes, self.noising = reuse_passes, noising
        if reuse_passes and not table.is_chain():
            raise ValueError(
                "reuse_passes = True: a step of the sampler does not end where the next begins, so no passes can be shared."
            )
        if flow is not None and objective.reverse_target != self.reverse_target:
            raise ValueError(
                f"objective.reverse_target = {objective.reverse_target!r}: {type(self).__name__} computes {self.reverse_target!r}; "
                "use fastnabla.methods.reference_target.ReferenceTargetStep for 'reference'."
            )
        if noising:
            check_is_ddpm(table, "db")
        if objective.reverse_second_order and not policy.twice_differentiable:
            raise ValueError(
                "objective.reverse_second_order = True: networks that are compiled, checkpointed or use xformers' attention "
                "have no second derivatives; set --compute.compile none --memory.checkpoint-network False --compute.attention sdpa."
            )

    def __call__(self, transitions: Transitions | LazyTransitions, total: int | None = None) -> StepReport:
        """Add the gradients of the mean loss over `transitions` to the parameters' `.grad`.

        Args:
            transitions: in any order; for terminal reward gradients, with the last one of each trajectory. A `LazyTransitions`
                is gathered one micro-batch at a time.
            total: divisor of the sums over transitions, if the batch is split over several calls.

        Raises:
            ValueError: terminal reward gradients, and a trajectory's last transition is not in the batch.
            torch.OutOfMemoryError: not even one transition at a time fits.
        """
        selection = transitions.select() if isinstance(transitions, Transitions) else transitions
        total = total or self.world.sum(len(selection))
        terminal = self._terminal_scores(selection) if self.objective.reward_gradient == "terminal" else None
        cut_rows = functools.partial(cut, selection, len(self.table), reuse_passes=self.reuse_passes)
        parts = Parts(self, len(selection), cut_rows)
        with self._networks():
            for part in parts:  # if memory runs out, _attempt returns None and the next parts are smaller
                parts.add(self._attempt(len(part.rows), self.gradients, part, total, terminal))
        return parts.report()

    def gradients(self, part: MicroBatch, total: int, terminal: dict[int, Tensor] | None = None) -> PartResult:
        """The gradients of one micro-batch. One UNet graph is alive at a time.

        Args:
            part: the transitions.
            total: divisor of the sums over them.
            terminal: ∇r(x_T) by trajectory, if that is the reward gradient.
        """
        objective, policy, settings = self.objective, self.policy, self._settings
        batch, prompts = part.gather(), part.selection.prompt
        rows = self.table.rows(batch.step_index, batch.x)
        x, states = batch.x.detach().requires_grad_(), (batch.x, batch.x_next, rows)
        with_reverse = part.has_reverse and self.flow is not None and objective.reverse_weight > 0
        through_network = objective.reward_gradient == "lookahead"

        # Reward scores ∇r(x'). They come first, while no other graph is alive; only the scores are kept.
        look_ahead = terminal is None and not part.last
        if look_ahead:  # the other scores come from the policy's pass at x
            unshared = unshared_scores(policy, self._pixel_gradient, part, batch, self.table, through_network)
        elif terminal is None:
            reward = RewardScores(at_next=self._pixel_gradient(batch.x_next, prompts.tolist()))
        else:
            score = torch.stack([terminal[slot] for slot in part.selection.trajectory.tolist()])
            reward = RewardScores(at_next=score, at_current=score)

        # Reference: o_ref, and for the reverse residual its vector-Jacobian product.
        output_ref, vjp_ref = self._reference(x, batch, rows, with_reverse, part.selection.reference)

        # Policy: o_θ, and with it the reward scores ∇r(x).
        output = policy(x, rows.timestep, batch.prompt)
        if look_ahead:
            here = (rows, x, output, unshared)
            reward = predicted_scores(
                policy, self._pixel_gradient, part, *here, through_network=through_network, at_current=with_reverse
            )

        # Forward residual, s_θ − λ s_ref − g(x') − βγ∇r(x'), with the terminal term and the trust region.
        flow, flow_next = self._flow_scores(part, batch, rows, with_reverse)
        forward = self.ops.forward_balance(
            output, output_ref, *states, reward.at_next, flow_next, batch.model_output, **settings
        )
        reverse = None
        if with_reverse:
            # Reverse residual, λ (s̄_θ − s̄_ref) + g(x) + βγ∇r(x).
            vjp = self._vjp(x, output, states, reward.at_prediction if through_network else None)
            ops = second_order if objective.reverse_second_order else self.ops
            scores = (reward.at_current, reward.at_prediction, (output, output_ref))
            reverse = objective.reverse_weight * ops.reverse_balance(vjp, vjp_ref, rows, flow, *scores, **settings)
            if (factor := part.selection.reverse_factor) is not None:
                reverse = reverse * factor.to(reverse.device, non_blocking=True)
        return self._part_result(part, batch, total, forward, reverse)

    def _part_result(
        self, part: MicroBatch, batch: Transitions, total: int, forward: ForwardBalance, reverse: Tensor | None
    ) -> PartResult:
        """The gradients and the report of a micro-batch, from its losses by row; `reverse` includes ρ and the factor of its
        draw."""
        loss = forward.loss if reverse is None else forward.loss + reverse
        zero = torch.zeros_like(forward.forward)
        loss_reverse = zero if reverse is None else reverse.detach()
        terms = {
            "forward": forward.forward,
            "reverse": loss_reverse,
            "terminal": forward.terminal,
            "trust_region": self.objective.trust_region_weight * forward.trust,
        }
        values = (forward.forward, loss_reverse, batch.step_index, part.selection.prompt)
        by_row = dict(zip(ROWS, values, strict=True)) | {name: getattr(forward, name) for name in STATISTICS}
        return PartResult(
            gradients=self._differentiate(loss.sum() / total),
            losses={name: values.sum() / total for name, values in terms.items()},
            rows=by_row,
        )

    @contextlib.contextmanager
    def _networks(self) -> Iterator[None]:
        """Within the context, the networks are ready for the passes of a step."""
        with contextlib.ExitStack() as stack:
            if not self.noising:
                stack.enter_context(self.policy.whole_reference())
            if self.objective.reverse_second_order:  # fused attention has no second derivatives
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    def _reference(
        self, x: Tensor, batch: Transitions, rows: TransitionRows, with_reverse: bool, cached: CachedRows | None
    ) -> tuple[Tensor, Tensor | None]:
        """The output pair at x whose step has P_B's score, and its vector-Jacobian product `[n, …]` if `with_reverse`. Both
        are constants, independent of θ and φ, so later inner epochs read them from `cached`."""
        policy, w, states = self.policy, self.policy.guidance_scale, (batch.x, batch.x_next, rows)
        if self.noising:
            o, vjp = noising_output(*states), noising_reverse(*states) if with_reverse else None
            return o if w is None else torch.cat([o, o]), vjp
        known = None if cached is None else cached.read()
        if known is not None:
            o, vjp = known
            return o if w is None else torch.cat([o, o]), vjp if with_reverse else None
        vjp = None
        with policy.pretrained_weights():  # in the backward pass too, where checkpointed blocks are computed again
            with torch.set_grad_enabled(with_reverse):
                output = policy(x, rows.timestep, batch.prompt)
            if with_reverse:
                cotangent = self.ops.reverse_cotangent(output.detach(), *states, **self._settings)
                (vjp,) = torch.autograd.grad(output, x, cotangent)
        if cached is not None:
            cached.write(guide(output, w), vjp)
        return output.detach(), vjp

    def _vjp(self, x: Tensor, output: Tensor, states: tuple, pixel_score: Tensor | None) -> Tensor:
        """The policy's vector-Jacobian product: the part of ``λ s̄_θ + ∇R(x)`` that passes through the network, without ∇R
        if `pixel_score` is None. The graph of `output` is kept."""
        if not self.objective.reverse_second_order:
            cotangent = self.ops.reverse_cotangent(output.detach(), *states, pixel_score, **self._settings)
            (vjp,) = torch.autograd.grad(output, x, cotangent, retain_graph=True)
            return vjp
        cotangent = second_order.score_cotangent(output, *states, **self._settings)
        (vjp,) = torch.autograd.grad(output, x, cotangent, create_graph=True)
        vjp = self.policy.passes.watch_backward(vjp, 2 * len(x))
        if pixel_score is None:
            return vjp
        # ∇R stays a constant, so its product is taken apart from that of the score.
        reward_alone = self._settings | {"objective": dataclasses.replace(self.objective, prior_weight=0.0)}
        cotangent = self.ops.reverse_cotangent(output.detach(), *states, pixel_score, **reward_alone)
        return vjp + torch.autograd.grad(output, x, cotangent, retain_graph=True)[0]

    def _flow_scores(
        self, part: MicroBatch, batch: Transitions, rows: TransitionRows, with_reverse: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """g(x) and g(x') in one call, with each state once. g(x) is None unless `with_reverse`."""
        if self.flow is None:
            return None, None
        if not with_reverse:
            return None, self._flow_values(batch.x_next, rows.timestep_next, batch.prompt)
        device = batch.x.device
        unshared = part.unshared.to(device, non_blocking=True)
        states = torch.cat([batch.x, batch.x_next[unshared]])
        timestep = torch.cat([rows.timestep, rows.timestep_next[unshared]])
        scores = self._flow_values(states, timestep, torch.cat([batch.prompt, batch.prompt[unshared]]))
        return scores[: len(batch)], scores[part.next_state_index().to(device, non_blocking=True)]

    def _terminal_scores(self, selection: LazyTransitions) -> dict[int, Tensor]:
        samples = int((selection.step_index == len(self.table) - 1).sum())
        while True:
            size = min(self.micro_batch, samples)
            scores = self._attempt(size, terminal_scores, selection, len(self.table), self._pixel_gradient, size)
            if scores is not None:
                return scores

    def _pixel_gradient(self, latents: Tensor, prompts: Sequence[int]) -> Tensor:
        return self.decoder.reward_gradient(latents, [self.prompts[i] for i in prompts], self.reward)[1]

    @property
    def _settings(self) -> dict[str, Objective | float | None]:
        """Arguments of the objective's operations besides tensors."""
        return {"objective": self.objective, "guidance_scale": self.policy.guidance_scale}

    @property
    def path(self) -> str:
        """How gradients are computed, in words."""
        return f"{super().path}, objective.reward_gradient = {self.objective.reward_gradient!r}"

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        means = {name: rows[name].mean() for name in STATISTICS if name.startswith("norm")}
        return means | {"max_residual": rows["max_residual"].max()}

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        reward = {REWARD_GRADIENT: largest(rows["norm_reward"])} if self.objective.beta > 0 else {}
        return {DRIVE: largest(rows["loss_forward"]), **reward}
