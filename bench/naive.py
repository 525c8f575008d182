"""The published algorithm, pass for pass: the baseline that fastnabla's training step is measured against.

A loop over the drawn steps; in each, for all trajectories, the last step included: reference forward and backward to
the input, policy forward and two backwards to the input (the step's score, the reward's), next-state forward and
backward, two separate decodes with gradients kept whole, two calls of the flow network, scores subtracted as they
are. Prompts are those of the rows, unlike in the reference implementation.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastnabla.models.policy import Policy
from fastnabla.objective.balance import reward_weight
from fastnabla.objective.gaussian import guide, step_score
from fastnabla.objective.settings import Objective
from fastnabla.trajectories.transitions import Transitions
from fastnabla.transition import TransitionRows, TransitionTable


def naive_step(
    policy: Policy,
    flow: nn.Module | None,
    decode: Callable[[Tensor], Tensor],
    reward: Callable[[Tensor, Sequence[str]], Tensor],
    prompts: Sequence[str],
    table: TransitionTable,
    objective: Objective,
    slots: Sequence[Transitions],
) -> None:
    """Accumulate the gradients of residual ∇-DB over `slots`, each of one drawn step of every trajectory."""
    w, prior_weight, reverse = policy.guidance_scale, objective.prior_weight, objective.reverse_weight

    def step_score_in_start(o: Tensor, x: Tensor, x_next: Tensor, row: TransitionRows, retain: bool) -> Tensor:
        log_probability = -(x_next - row.a * x - row.b * o).square().sum() / 2
        (score,) = torch.autograd.grad(log_probability, x, retain_graph=retain)
        return prior_weight * score / row.sigma**2

    def reward_score(clean: Tensor, x: Tensor, texts: list[str], retain: bool) -> Tensor:
        (score,) = torch.autograd.grad(reward(decode(clean), texts).sum(), x, retain_graph=retain)
        return score

    for slot in slots:
        row = table.rows(slot.step_index, slot.x)
        texts = [prompts[i] for i in slot.prompt.tolist()]
        last = slot.step_index == len(table) - 1
        keep = (~last).float().view(-1, 1, 1, 1)
        x = slot.x.clone().requires_grad_()

        with torch.set_grad_enabled(reverse > 0):
            o_ref = guide(policy.reference(x, row.timestep, slot.prompt), w)
        score_ref = prior_weight * step_score(o_ref, slot.x, slot.x_next, row).detach()
        if reverse > 0:
            score_ref_reverse = step_score_in_start(o_ref, x, slot.x_next, row, retain=False)

        o = guide(policy(x, row.timestep, slot.prompt), w)
        score = step_score(o, slot.x, slot.x_next, row)
        if reverse > 0:
            score_reverse = step_score_in_start(o, x, slot.x_next, row, retain=True)
            reward_here = reward_score(row.c * x + row.d * o, x, texts, retain=True)
            reward_here = objective.beta * reward_weight(row.alpha_bar, objective.gamma) * reward_here

        x_next = slot.x_next.clone().requires_grad_()
        o_next = guide(policy(x_next, row.timestep_next, slot.prompt), w)
        reward_next = reward_score(row.c_next * x_next + row.d_next * o_next, x_next, texts, retain=False)
        reward_next = objective.beta * reward_weight(row.alpha_bar_next, objective.gamma) * reward_next

        target = score_ref + reward_next
        loss = objective.trust_region_weight * (o - slot.model_output).square().mean()
        if flow is not None:
            embeddings = policy.conditions.of_prompts(slot.prompt)
            flow_next = flow(slot.x_next, row.timestep_next, embeddings)
            flow_here = flow(slot.x, row.timestep, embeddings)
            target = target + keep * flow_next
            if last.any():
                loss = loss + flow_next[last].square().mean() * last.float().mean()
            if reverse > 0:
                residual = keep * (score_reverse - score_ref_reverse + flow_here + reward_here)
                loss = loss + reverse * residual.square().mean()
        loss = loss + (score - target).square().mean()
        (loss / len(slots)).backward(inputs=[*policy.weights(), *(flow.parameters() if flow is not None else ())])
