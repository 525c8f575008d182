"""Scores of the reward, ∇r, at the states of a micro-batch: at one-step predictions of the clean sample, or at its end."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnabla.methods.micro_batches import MicroBatch
from fastnabla.models.policy import Policy
from fastnabla.objective.gaussian import full, guide, unguide
from fastnabla.trajectories.transitions import LazyTransitions, Transitions
from fastnabla.transition import TransitionTable

PixelGradient = Callable[[Tensor, Sequence[int]], Tensor]
"""Gradients `[N, C, H, W]` of the rewards of clean latents, `[N, C, H, W]` with their N prompt numbers, in them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RewardScores:
    """Gradients of the unscaled reward, `[n, C, H, W]`, as far as a micro-batch needs them."""

    after: Tensor
    """∇r(x')."""
    before: Tensor | None = None
    """∇r(x), where it is known without the UNet's Jacobian;"""
    clean: Tensor | None = None
    """else ∂r/∂x̂0 at the prediction from x."""


class LookAhead:
    """∇r at the one-step predictions from x' (and, `here`, from x) of a micro-batch's inner transitions.

    What needs the UNet at next states is done at once, and its graph is freed. Where a row starts in the state in which
    another ends, the row's own pass gives both their score, in `scores`.

    Args:
        policy, pixel_gradient, table: what computes them.
        micro: the micro-batch.
        batch: its transitions.
        prompts: their prompt numbers `[n]`, on the host.
        through_unet: take ∇r through the UNet's Jacobian.
        here: the gradient at the predictions from x is wanted.
    """

    def __init__(
        self,
        policy: Policy,
        pixel_gradient: PixelGradient,
        table: TransitionTable,
        micro: MicroBatch,
        batch: Transitions,
        prompts: Tensor,
        *,
        through_unet: bool,
        here: bool,
    ) -> None:
        self.policy, self.pixel_gradient, self.table = policy, pixel_gradient, table
        self.micro, self.batch, self.prompts = micro, batch, prompts
        self.through_unet, self.here = through_unet, here
        self.score_tails = self._score_tails()

    def _score_tails(self) -> Tensor:
        """∇r(x') of the rows whose next state is no other row's state."""
        # In the backward pass too, where checkpointed blocks are computed again.
        with self.policy.constant_weights():
            return self._score_tails_of_constant_weights()

    def _score_tails_of_constant_weights(self) -> Tensor:
        batch, w, tails = self.batch, self.policy.guidance_scale, self.micro.tails
        if len(tails) < len(batch):
            batch = batch[self._on_device(tails)]
        row = self.table.rows(batch.step_index, batch.x)
        x_next = batch.x_next.detach().requires_grad_(self.through_unet)
        with torch.set_grad_enabled(self.through_unet):
            output = self.policy(x_next, row.timestep_next, batch.prompt)
        clean = row.c_next * batch.x_next + row.d_next * guide(output.detach(), w)
        pixel = self.pixel_gradient(clean, self.prompts[tails].tolist())
        score = row.c_next * pixel
        if self.through_unet:
            (vjp,) = torch.autograd.grad(output, x_next, unguide(row.d_next * pixel, w).to(output.dtype))
            score = score + full(vjp)
        return score

    def scores(self, x: Tensor, output: Tensor) -> RewardScores:
        """The scores, given the policy's output pair `output` at `x`, a leaf that requires a gradient; its graph stays."""
        batch, w, followers = self.batch, self.policy.guidance_scale, self.micro.followers
        rows = torch.arange(len(batch)) if self.here else followers
        if not len(rows):
            return RewardScores(after=self.score_tails)
        row = self.table.rows(batch.step_index, batch.x)
        clean = row.c * batch.x + row.d * guide(output.detach(), w)
        if self.here:
            pixel = self.pixel_gradient(clean, self.prompts.tolist())
        else:
            some = self._on_device(rows)
            gradient = self.pixel_gradient(clean[some], self.prompts[rows].tolist())
            pixel = torch.zeros_like(clean).index_copy(0, some, gradient)
        after = self.score_tails
        if len(followers):
            score = row.c * pixel
            if self.through_unet:
                cotangent = unguide(row.d * pixel, w).to(output.dtype)
                (vjp,) = torch.autograd.grad(output, x, cotangent, retain_graph=True)
                score = score + full(vjp)
            after = torch.cat([score, after])[self._on_device(self.micro.after())]
        return RewardScores(after=after, clean=pixel if self.here else None)

    def _on_device(self, rows: Tensor) -> Tensor:
        return rows.to(self.batch.x.device, non_blocking=True)


class TerminalScores:
    """∇r at the finished samples of a selection: one reward gradient a trajectory.

    Args:
        selection: with the last transition of each of its trajectories.
        num_steps: T.
        pixel_gradient: what computes them.
        size: most samples at once.

    Raises:
        ValueError: a trajectory's last transition is not in the selection.
    """

    def __init__(self, selection: LazyTransitions, num_steps: int, pixel_gradient: PixelGradient, size: int) -> None:
        is_last = selection.step_index == num_steps - 1
        if not bool(torch.isin(selection.trajectory, selection.trajectory[is_last]).all()):
            raise ValueError(
                "objective.reward_gradient = 'terminal' needs the last transition of every trajectory in the batch; "
                "gather whole trajectories, or use another objective.reward_gradient."
            )
        places = {slot: row for row, slot in enumerate(selection.trajectory.tolist()) if is_last[row]}
        self.number = {slot: number for number, slot in enumerate(places)}
        rows = torch.tensor(list(places.values()), dtype=torch.int64)
        self.scores = torch.cat(
            [
                pixel_gradient(selection.gather(part).x_next, selection.prompt[part].tolist())
                for part in rows.split(size)
            ]
        )

    def of(self, trajectory: Tensor) -> Tensor:
        """The scores `[n, C, H, W]` of the trajectories in slots `trajectory [n]`, on the host."""
        numbers = torch.tensor([self.number[slot] for slot in trajectory.tolist()], dtype=torch.int64)
        return self.scores[numbers.to(self.scores.device, non_blocking=True)]
