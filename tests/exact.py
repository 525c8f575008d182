"""The objectives by their definitions, in float64: guidance, samplers, densities, decoding and rewards are written out, and
autograd takes every score. Of fastnabla only `Policy` computes here; the golden steps tie its outputs to the reference.

This is one of the two independent derivations that tests compare with. The other, `bench/naive.py`, is the published
algorithm in its own order.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastnabla.objective.settings import Gamma, Objective
from tests.golden import GoldenStep


def guided(pair: Tensor, guidance_scale: float | None) -> Tensor:
    """The output `[N, …]` of a pair `[2N, …]`, unconditional rows first; of `[N, …]` without guidance."""
    if guidance_scale is None:
        return pair
    unconditional, conditional = pair[: len(pair) // 2], pair[len(pair) // 2 :]
    return (1 - guidance_scale) * unconditional + guidance_scale * conditional


def gamma_of(alpha_bar: Tensor, gamma: Gamma) -> Tensor:
    return alpha_bar ** {"alpha_bar": 1.0, "sqrt_alpha_bar": 0.5, "constant": 0.0}[gamma]


class Exact:
    """Float64 copies of a golden step's networks, and formulas of single transitions `[1, …]` at step i."""

    def __init__(self, golden: GoldenStep) -> None:
        self.table = golden.table
        self.policy = copy.deepcopy(golden.policy).double()
        self.policy.dtype = torch.float64
        self.flow = copy.deepcopy(golden.flow).double() if golden.flow is not None else None
        self.vae, self.reward_network = (copy.deepcopy(n).double() for n in (golden.decoder.vae, golden.reward))
        self.transitions = golden.transitions

    def gradients(self, golden: GoldenStep, loss: Tensor) -> dict[str, Tensor]:
        """Of a scalar, under the names of `golden.gradients()`."""
        parameters = self.policy.trainable() + (list(self.flow.parameters()) if self.flow is not None else [])
        values = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return dict(zip(golden.gradients(), values, strict=True))

    def at(self, name: str, i: int) -> Tensor:
        return getattr(self.table, name)[i]

    def output(self, x: Tensor, i: int, prompt: Tensor, after: bool = False, reference: bool = False) -> Tensor:
        """Guided output at the state x of step i, or at the state it ends in."""
        network = self.policy.reference if reference else self.policy
        return guided(
            network(x, self.at("timestep_next" if after else "timestep", i)[None], prompt), self.policy.guidance_scale
        )

    def clean(self, x: Tensor, o: Tensor, i: int, after: bool = False) -> Tensor:
        c, d = (self.at(name + "_next" * after, i) for name in "cd")
        return c * x + d * o

    def reward(self, clean: Tensor, prompt: Tensor) -> Tensor:
        """`[N]`, differentiable."""
        config = self.vae.config
        images = self.vae.decode(clean / config.scaling_factor + (config.shift_factor or 0)).sample / 2 + 0.5
        return self.reward_network(images.clamp(0, 1), [str(p) for p in prompt.tolist()])

    def log_prob(self, x: Tensor, x_next: Tensor, o: Tensor, i: int) -> Tensor:
        """log P(x'|x), a scalar."""
        mean, sigma = self.at("a", i) * x + self.at("b", i) * o, self.at("sigma", i)
        return Normal(mean, sigma).log_prob(x_next).sum()

    def log_noising(self, x: Tensor, x_next: Tensor, i: int) -> Tensor:
        """log q(x|x') of the noising from the signal and noise of x' to those of x, a scalar."""
        share = self.at("alpha_bar", i) / self.at("alpha_bar_next", i)
        variance = self.at("noise_std", i) ** 2 - share * self.at("noise_std_next", i) ** 2
        return Normal(share.sqrt() * x_next, math.sqrt(variance)).log_prob(x).sum()

    def flow_at(self, x: Tensor, i: int, prompt: Tensor, after: bool = False) -> Tensor:
        timestep = self.at("timestep_next" if after else "timestep", i)[None]
        return self.flow(x, timestep, self.policy.conditions.of_prompts(prompt))

    def rows(self):
        """Each transition: its step, states (float64 leaves), stored output and prompt."""
        for row in range(len(self.transitions)):
            one = self.transitions[row : row + 1]
            x, x_next = (state.double().requires_grad_() for state in (one.x, one.x_next))
            yield int(one.step_index), x, x_next, one.model_output.double(), one.prompt

    def reward_score(
        self, state: Tensor, o: Tensor, i: int, prompt: Tensor, trajectory: Tensor, objective: Objective, after: bool
    ) -> Tensor:
        """∇R at the state x of step i, or at the state it ends in; o is the output there that predicts the clean sample."""
        clean = self.clean(state, o.detach() if objective.reward_gradient == "lookahead_detached" else o, i, after)
        if objective.reward_gradient == "terminal":
            ends = self.transitions.step_index == len(self.table) - 1
            end = self.transitions.x_next[ends & (self.transitions.trajectory == trajectory)][:1]
            state = clean = end.double().requires_grad_()
        score = grad(self.reward(clean, prompt).sum(), state, retain_graph=True)
        alpha_bar = self.at("alpha_bar_next" if after else "alpha_bar", i)
        return objective.beta * gamma_of(alpha_bar, objective.gamma) * score

    @sdpa_kernel(SDPBackend.MATH)  # has second derivatives
    def balance_loss(self, objective: Objective, noising: bool = False) -> Tensor:
        """The mean loss of residual ∇-DB over all transitions; with `noising` that of plain ∇-DB."""
        total, last_step, second = 0, len(self.table) - 1, objective.reverse_second_order
        for (i, x, x_next, o_old, prompt), trajectory in zip(self.rows(), self.transitions.trajectory, strict=True):
            of_reward = (i, prompt, trajectory, objective)
            unit = self.at("sigma", i) if objective.weighting == "sigma" else 1.0
            o, o_next = self.output(x, i, prompt), self.output(x_next, i, prompt, after=True)
            log_prob = self.log_prob(x, x_next, o, i)
            if noising:
                log_ref = self.log_noising(x, x_next, i)
            else:
                log_ref = self.log_prob(x, x_next, self.output(x, i, prompt, reference=True), i)
            score = grad(log_prob, x_next, create_graph=True)
            forward = score - objective.prior_weight * grad(log_ref, x_next, retain_graph=True)
            forward = forward - self.reward_score(x_next, o_next, *of_reward, after=True)
            loss = objective.trust_region_weight * (o - o_old).square().mean()
            if self.flow is not None:
                g_next = self.flow_at(x_next.detach(), i, prompt, after=True)
                if i == last_step:
                    loss = loss + (unit * g_next).square().mean()
                else:
                    forward = forward - g_next
                    score = grad(log_prob, x, create_graph=second, retain_graph=True)
                    reverse = objective.prior_weight * (score - grad(log_ref, x, retain_graph=True))
                    reverse = reverse + self.flow_at(x.detach(), i, prompt)
                    reverse = reverse + self.reward_score(x, o, *of_reward, after=False)
                    loss = loss + objective.reverse_weight * (unit * reverse).square().mean()
            total = total + (loss + (unit * forward).square().mean()) / len(self.transitions)
        return total

    def reference_target_loss(self, objective: Objective) -> Tensor:
        """The mean loss over all transitions of residual ∇-DB with a flow that follows the reference."""
        total, last_step = 0, len(self.table) - 1
        for (i, x, x_next, o_old, prompt), trajectory in zip(self.rows(), self.transitions.trajectory, strict=True):
            of_reward = (i, prompt, trajectory, objective)
            unit = self.at("sigma", i) if objective.weighting == "sigma" else 1.0
            o_ref, o_ref_next = (
                self.output(state, i, prompt, after=after, reference=True)
                for state, after in ((x, False), (x_next, True))
            )
            h_next = self.reward_score(x_next, o_ref_next, *of_reward, after=True)
            if i != last_step:
                h_next = h_next + self.flow_at(x_next.detach(), i, prompt, after=True).detach()
            o = self.output(x.detach(), i, prompt)
            score = grad(self.log_prob(x.detach(), x_next, o, i), x_next, create_graph=True)
            score_ref = grad(self.log_prob(x, x_next, o_ref, i), x_next, retain_graph=True)
            forward = score - objective.prior_weight * score_ref - h_next
            mean_ref = self.at("a", i) * x + self.at("b", i) * o_ref
            h = self.flow_at(x.detach(), i, prompt) + self.reward_score(x, o_ref, *of_reward, after=False)
            reverse = h - grad((mean_ref * h_next).sum(), x)
            loss = (unit * forward).square().mean() + objective.reverse_weight * (unit * reverse).square().mean()
            total = total + loss + objective.trust_region_weight * (o - o_old).square().mean()
        return total / len(self.transitions)


def grad(scalar: Tensor, x: Tensor, **options: bool) -> Tensor:
    return torch.autograd.grad(scalar, x, **options)[0]


class Smooth(nn.Module):
    """A small nonlinear policy, `[N, D]` to `[N, D]`, for float64 checks of formulas."""

    def __init__(self, size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(size, size, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh()
