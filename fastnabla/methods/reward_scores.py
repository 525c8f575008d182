"""Reward scores ∇r of a micro-batch, taken at one-step predictions of the clean sample or at the finished sample."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnabla.methods.micro_batches import MicroBatch
from fastnabla.models.policy import Policy
from fastnabla.objective.gaussian import full, guide, unguide
from fastnabla.trajectories.transitions import LazyTransitions, Transitions
from fastnabla.transition import TransitionRows, TransitionTable

PixelGradient = Callable[[Tensor, Sequence[int]], Tensor]
"""Clean latents `[N, C, H, W]` and their N prompt numbers to the gradients of their rewards, `[N, C, H, W]`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RewardScores:
    """Gradients of the unscaled reward, `[n, C, H, W]`, as far as a micro-batch needs them."""

    at_next: Tensor
    """∇r(x')."""
    at_current: Tensor | None = None
    """∇r(x), if it is known without the UNet's Jacobian."""
    at_prediction: Tensor | None = None
    """Otherwise ∂r/∂x̂0 at the prediction from x."""


def terminal_scores(
    selection: LazyTransitions, num_steps: int, pixel_gradient: PixelGradient, size: int
) -> dict[int, Tensor]:
    """∇r(x_T) `[C, H, W]` by trajectory. Each is computed once, however many transitions the trajectory has.

    Args:
        selection: transitions, among them the last one of each trajectory.
        num_steps: T.
        pixel_gradient: computes them.
        size: maximum number of samples at once.

    Raises:
        ValueError: a trajectory's last transition is not in the selection.
    """
    is_last = selection.step_index == num_steps - 1
    if not bool(torch.isin(selection.trajectory, selection.trajectory[is_last]).all()):
        raise ValueError(
            "objective.reward_gradient = 'terminal' needs the last transition of every trajectory in the batch; "
            "gather whole trajectories, or use another objective.reward_gradient."
        )
    places = {slot: row for row, slot in enumerate(selection.trajectory.tolist()) if is_last[row]}
    rows = torch.tensor(list(places.values()), dtype=torch.int64)
    scores = [
        pixel_gradient(selection.gather(part).x_next, selection.prompt[part].tolist()) for part in rows.split(size)
    ]
    return dict(zip(places, torch.cat(scores), strict=True))


def unshared_scores(
    policy: Policy,
    pixel_gradient: PixelGradient,
    part: MicroBatch,
    batch: Transitions,
    table: TransitionTable,
    through_network: bool,
) -> Tensor:
    """∇r(x̂0(x')) `[u, C, H, W]` of the `unshared` rows of `part`, from a policy pass at their x'.

    Args:
        policy, pixel_gradient: compute them.
        part: an inner micro-batch.
        batch: its transitions.
        table: the sampler.
        through_network: differentiate through the UNet too.
    """
    w, unshared = policy.guidance_scale, part.unshared
    if len(unshared) < len(batch):
        batch = batch[unshared.to(batch.x.device, non_blocking=True)]
    rows = table.rows(batch.step_index, batch.x)
    with policy.constant_weights():  # in the backward pass too, where checkpointed blocks are computed again
        x_next = batch.x_next.detach().requires_grad_(through_network)
        with torch.set_grad_enabled(through_network):
            output = policy(x_next, rows.timestep_next, batch.prompt)
        clean = rows.c_next * batch.x_next + rows.d_next * guide(output.detach(), w)
        pixel = pixel_gradient(clean, part.selection.prompt[unshared].tolist())
        return _score(pixel, rows.c_next, rows.d_next, x_next, output if through_network else None, w)


def predicted_scores(
    policy: Policy,
    pixel_gradient: PixelGradient,
    part: MicroBatch,
    rows: TransitionRows,
    x: Tensor,
    output: Tensor,
    unshared: Tensor,
    *,
    through_network: bool,
    at_current: bool,
) -> RewardScores:
    """Reward scores of an inner micro-batch. The scores at next states that are states of other rows come from those rows'
    own passes; `unshared_scores` has computed the rest.

    Args:
        policy, pixel_gradient: compute them.
        part: the micro-batch.
        rows: table rows of its transitions.
        x: their states, a leaf that requires a gradient.
        output: the policy's output pair at `x`; its graph is kept.
        unshared: ∇r(x') of the `unshared` rows.
        through_network: differentiate through the UNet too.
        at_current: return the gradients at the predictions from all x too.
    """
    w, shared = policy.guidance_scale, part.shared
    if not at_current and not len(shared):
        return RewardScores(at_next=unshared)
    clean = rows.c * x.detach() + rows.d * guide(output.detach(), w)
    if at_current:
        pixel = pixel_gradient(clean, part.selection.prompt.tolist())
    else:
        some = shared.to(x.device, non_blocking=True)
        gradient = pixel_gradient(clean[some], part.selection.prompt[shared].tolist())
        pixel = torch.zeros_like(clean).index_copy(0, some, gradient)
    at_next = unshared
    if len(shared):
        score = _score(pixel, rows.c, rows.d, x, output if through_network else None, w, retain_graph=True)
        at_next = torch.cat([score, unshared])[part.next_state_index().to(x.device, non_blocking=True)]
    return RewardScores(at_next=at_next, at_prediction=pixel if at_current else None)


def current_scores(
    policy: Policy,
    pixel_gradient: PixelGradient,
    part: MicroBatch,
    rows: TransitionRows,
    x: Tensor,
    output: Tensor,
    *,
    through_network: bool,
) -> Tensor:
    """∇r(x̂0(x)) `[n, C, H, W]` at the states x of a micro-batch.

    Args:
        policy, pixel_gradient: compute them.
        part: the micro-batch.
        rows: table rows of its transitions.
        x: their states, a leaf that requires a gradient.
        output: the policy's output pair at `x`; its graph is kept.
        through_network: differentiate through the network too.
    """
    w = policy.guidance_scale
    clean = rows.c * x.detach() + rows.d * guide(output.detach(), w)
    pixel = pixel_gradient(clean, part.selection.prompt.tolist())
    return _score(pixel, rows.c, rows.d, x, output if through_network else None, w, retain_graph=True)


def _score(
    pixel: Tensor,
    c: Tensor,
    d: Tensor,
    x: Tensor,
    output: Tensor | None,
    guidance_scale: float | None,
    retain_graph: bool = False,
) -> Tensor:
    """``∇_x r(x̂0(x)) = c p + Jᵀ d p`` with p = ∂r/∂x̂0 and x̂0 = c x + d o; without the second term if `output` is None."""
    if output is None:
        return c * pixel
    cotangent = unguide(d * pixel, guidance_scale).to(output.dtype)
    (vjp,) = torch.autograd.grad(output, x, cotangent, retain_graph=retain_graph)
    return c * pixel + full(vjp)
