"""The training step of Adjoint Matching (Domingo-Enrich et al., arXiv 2409.08861), with lean adjoints and no flow network.

It has the target of residual ∇-DB, ``p_ref exp(βγ r)``, as the optimum of a control problem: minimise

    E_θ[ −βγ r(x_T) + Σ_i KL(P_θ(· | x_i) ‖ P_ref(· | x_i)) ],        P(· | x_i) = N(a_i x_i + b_i o(x_i), σ_i² I)

A trajectory of the current policy, without gradient, has *lean adjoints*. They go backwards through the reference policy
alone, J_ref being the Jacobian of its guided output:

    adj_T = βγ ∇r(x_T),      adj_i = (∂μ_ref/∂x)ᵀ adj_{i+1} = a_i adj_{i+1} + J_ref(x_i)ᵀ b_i adj_{i+1}

The policy regresses on them, at the last step and at drawn ones:

    ‖ σ_i [ (b_i/σ_i²)(o_θ − o_ref)(x_i) − adj_{i+1} ] ‖²

At the optimum the bracket has mean zero at every x_i, for the discrete sampler too: no small steps are assumed. With large steps
other policies may have this property as well. `docs/objectives.md` derives it by the envelope theorem.

Conventions: the paper's adjoint is that of a cost, so it is −adj. Its loss ``‖ 2(v_θ − v_ref)/σ(t) + σ(t) ã ‖²`` is the one above
over the time step Δt, with ``σ_i² = σ(t)² Δt``. γ is `objective.gamma` at x_T, a number close to 1, so that the target is that of
residual ∇-DB with the same settings. "constant" is the paper's.

A trajectory of T steps with K regressed ones takes T U for sampling, 2 T − 1 for the adjoints and 2 K for the regression.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnabla.methods.accumulation import PartResult, StepReport
from fastnabla.methods.sampling import SamplingStep
from fastnabla.methods.zero_gradients import DRIVE, REWARD_GRADIENT, largest
from fastnabla.models.decoder import Decoder, RewardFunction
from fastnabla.models.policy import Policy, add_to
from fastnabla.objective.balance import reward_weight
from fastnabla.objective.gaussian import full, unguide
from fastnabla.objective.settings import Backend, Objective
from fastnabla.trajectories.draws import DRAWS
from fastnabla.trajectories.reward_statistics import reward_statistics
from fastnabla.trajectories.sources import Trajectories
from fastnabla.transition import TransitionTable

REGRESSION = Objective(beta=1.0, gamma="constant", weighting="sigma", trust_region_weight=0.0)
"""With these settings `forward_balance` computes the regression, given the adjoint as the reward score."""
STATISTICS = ("norm_ref", "norm_residual", "norm_reward", "norm_target", "max_residual")


class AdjointStep(SamplingStep):
    """Samples trajectories and accumulates the gradients of the regression on their lean adjoints.

    Its reports have the loss "forward", the mean over the regressed transitions. By row they have values of these
    transitions, all K of a trajectory together: "loss_forward", the `STATISTICS` of `ForwardBalance` with the adjoint for the
    reward score, the trajectory's "reward", and, on the host, "step_index" and "prompt".

    Args:
        policy, decoder, reward, prompts, table, sample_shape, micro_batch, backend: as for `SamplingStep`.
        objective: only β and γ are used.
        draw: how the regressed steps are drawn, one of `fastnabla.trajectories.draws.DRAWS`.
        drawn_steps: K − 1, the number of steps drawn besides the last.
    """

    def __init__(
        self,
        policy: Policy,
        decoder: Decoder,
        reward: RewardFunction,
        prompts: Sequence[str],
        table: TransitionTable,
        sample_shape: tuple[int, ...],
        objective: Objective,
        draw: str,
        drawn_steps: int,
        micro_batch: int,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(policy, decoder, reward, prompts, table, sample_shape, micro_batch, backend)
        self.draw, self.drawn_steps = draw, drawn_steps
        self.scale = objective.beta * reward_weight(table.alpha_bar_next[-1], objective.gamma).item()
        """βγ, γ at x_T."""

    def __call__(self, trajectories: Trajectories, total: int | None = None) -> StepReport:
        """As `SamplingStep`."""
        with self.policy.whole_reference():
            return super().__call__(trajectories, total)

    def gradients(self, trajectories: Trajectories, total: int) -> PartResult:
        """As `SamplingStep.gradients`. One UNet graph of n rows is alive at a time."""
        sampling = self._sampling(trajectories)
        states = sampling.states()
        rewards, score = self._reward_gradient(states[-1], trajectories.prompt)
        steps = self.steps(trajectories)
        outputs_ref, adjoints = self.adjoints(states, steps, self.scale * score, sampling.prompt)

        policy, device, w = self.policy, score.device, self.policy.guidance_scale
        every, columns = torch.arange(len(trajectories), device=device), []
        gradients = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in policy.weights()]
        for step_index, output_ref, adjoint in zip(steps.T.contiguous(), outputs_ref, adjoints, strict=True):
            step_index = step_index.to(device, non_blocking=True)
            x, x_next = states[step_index, every], states[step_index + 1, every]
            rows = self.table.rows(step_index, x)
            output = policy(x, rows.timestep, sampling.prompt)
            balance = self.ops.forward_balance(
                output, output_ref, x, x_next, rows, adjoint, objective=REGRESSION, guidance_scale=w
            )
            add_to(gradients, self._differentiate(balance.loss.sum() / (total * steps.shape[1])))
            columns.append({"loss_forward": balance.forward} | {name: getattr(balance, name) for name in STATISTICS})

        by_row = {name: torch.stack([column[name] for column in columns], 1).flatten() for name in columns[0]}
        by_row |= {
            "reward": rewards.repeat_interleave(len(columns)),
            "step_index": steps.flatten(),
            "prompt": trajectories.prompt.repeat_interleave(len(columns)),
        }
        losses = {"forward": by_row["loss_forward"].sum() / (total * len(columns))}
        return PartResult(gradients=gradients, losses=losses, rows=by_row)

    def steps(self, trajectories: Trajectories) -> Tensor:
        """The regressed steps of each trajectory, from its seed: the last and the drawn ones, `[n, K]` int64 on the host."""
        draw, settings = DRAWS[self.draw], (len(self.table), self.drawn_steps)
        return torch.cat([draw(seed, 0, 1, *settings) for seed in trajectories.draws])

    def adjoints(self, states: Tensor, steps: Tensor, adjoint: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """The sweep backwards through the reference policy. It keeps what the regressed steps need.

        Args:
            states: x_0 … x_T, `[T + 1, n, C, H, W]`.
            steps: the regressed steps, `[n, K]` int64 on the host.
            adjoint: adj_T `[n, C, H, W]`.
            prompt: prompt numbers `[n]`, on the device.

        Returns:
            The reference policy's output pairs at the states before the regressed steps, `[K, 2n, C, H, W]` (`[K, n, …]`
            without guidance), and the lean adjoints after them, `[K, n, C, H, W]`.
        """
        policy, w, (count, drawn) = self.policy, self.policy.guidance_scale, steps.shape
        halves = 1 if w is None else 2
        outputs = torch.empty(drawn, halves, *adjoint.shape, dtype=policy.dtype, device=adjoint.device)
        adjoints = adjoint.new_empty(drawn, *adjoint.shape)
        with policy.pretrained_weights():  # in the backward pass too, where checkpointed blocks are computed again
            for step in reversed(range(len(self.table))):
                x = states[step].detach().requires_grad_()
                row = self.table.rows(torch.full((count,), step, device=x.device), x)
                with torch.set_grad_enabled(step > 0):  # adj_0 is not needed
                    output = policy(x, row.timestep, prompt)

                # Keep what is regressed here.
                rows, columns = (index.to(x.device, non_blocking=True) for index in torch.where(steps == step))
                pair = output.detach().unflatten(0, (halves, count))
                outputs[columns, :, rows] = pair[:, rows].transpose(0, 1)
                adjoints[columns, rows] = adjoint[rows]

                # Go back a step.
                if step:
                    cotangent = unguide(row.b * adjoint, w).to(output.dtype)
                    (vjp,) = torch.autograd.grad(output, x, cotangent)
                    adjoint = row.a * adjoint + full(vjp)
        return outputs.flatten(1, 2), adjoints

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        means = {name: rows[name].mean() for name in STATISTICS if name.startswith("norm")}
        rewards = reward_statistics(rows["reward"][:: self.drawn_steps + 1])
        return rewards | means | {"max_residual": rows["max_residual"].max()}

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        reward = {REWARD_GRADIENT: largest(rows["norm_reward"])} if self.scale > 0 else {}
        return {DRIVE: largest(rows["loss_forward"]), **reward}
