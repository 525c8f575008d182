"""DDPM's noising kernel (arXiv 2006.11239) as the backward policy P_B of a step x → x'.

With the states ``√ᾱ x0 + n ε`` and ``√ᾱ' x0 + n' ε``, α² = ᾱ/ᾱ' and s² = n² − α² n'² (for variance-preserving states 1 − α²):

    P_B(x|x') = N(α x', s² I),   ∇_{x'} log P_B = α (x − α x')/s²,   ∇_x log P_B = −(x − α x')/s²

By Bayes' rule DDPM's step given a clean sample is q(x'|x, x̂0) ∝ P_B(x|x') N(x'; √ᾱ' x̂0, n'² I). So the score of a
step with mean a x + b o differs from P_B's score by a score of the clean sample alone:

    s_θ − ∇_{x'} log P_B = −(x' − √ᾱ' x̂0_θ(x))/n'² = (b/σ²)(o_θ − o_B),   x̂0 of o_B: c x + d o_B = x'/√ᾱ'

P_B therefore takes the place of a reference policy with the output o_B. Plain ∇-DB (arXiv 2412.07775),

    forward   ∇_{x'} log P_θ(x'|x) − ∇_{x'} log P_B(x|x') − ∇log F(x')
    reverse   ∇_x log P_θ(x'|x) + ∇log F(x) − ∇_x log P_B(x|x'),   ∇log F(x_T) = β∇r(x_T)

is computed by the functions of residual ∇-DB (section 7 of the README). This holds only for DDPM's steps
(`check_is_ddpm`): P_B does not reverse steps with another variance.
"""

import math

import torch
from torch import Tensor

from fastnabla.objective.gaussian import full
from fastnabla.transition import TransitionRows, TransitionTable


def check_is_ddpm(table: TransitionTable, method: str) -> None:
    """Check that the steps of `table` are DDPM's, ``q(x'|x, x̂0)`` at the predicted x̂0 (equation 7).

    Raises:
        ValueError: they are not. The message names `method`, which needs them.
    """
    share = table.noise_std_next / table.noise_std
    of_x = table.noising_scale * share**2
    of_clean = table.alpha_bar_next.sqrt() * (table.noising_std / table.noise_std) ** 2
    expected = (of_x + of_clean * table.c, of_clean * table.d, table.noising_std * share)
    if table.alpha_bar_next[-1] == 1:
        raise ValueError(
            f"method = {method!r}: the sampler ends at the clean sample, a step that DDPM's noising kernel does not reverse; "
            "use --method residual-db, or in Python a table with end > 0."
        )
    steps = "scheduler = ddim and sampler.eta = 1" if table.is_flow_matching else "eta = 1"
    remedies = (steps, steps, "min_sigma = None")  # other steps have other means too, min_sigma has not
    for column, value, remedy in zip((table.a, table.b, table.sigma), expected, remedies, strict=True):
        if not torch.allclose(column, value, rtol=1e-9, atol=1e-12):
            raise ValueError(
                f"method = {method!r}: DDPM's noising kernel reverses DDPM's steps only; set sampler.{remedy}."
            )


def noising_output(x: Tensor, x_next: Tensor, rows: TransitionRows) -> Tensor:
    """o_B `[N, …]`, the output that predicts the clean sample ``x'/√ᾱ'``. A step with this output has P_B's score in x'."""
    return (full(x_next) / rows.alpha_bar_next.sqrt() - rows.c * full(x)) / rows.d


def noising_reverse(x: Tensor, x_next: Tensor, rows: TransitionRows) -> Tensor:
    """``∇_x log P_B`` `[N, …]` minus the direct part ``a e_B = −a ∇_{x'} log P_B`` of a policy with the output o_B. It takes
    the place of a reference policy's vector-Jacobian product. For ε-prediction, where a = 1/α, it is 0."""
    noise = (full(x) - rows.noising_scale * full(x_next)) / rows.noising_std**2
    return (rows.a * rows.noising_scale - 1) * noise


def noising_log_prob(x: Tensor, x_next: Tensor, rows: TransitionRows) -> Tensor:
    """``log P_B(x|x')`` by row `[N]`: the log-density of the whole state."""
    noise = (full(x) - rows.noising_scale * full(x_next)) / rows.noising_std
    return -(0.5 * noise.square() + rows.noising_std.log() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def renoise(x_next: Tensor, noise: Tensor, rows: TransitionRows) -> Tensor:
    """A sample of P_B(x|x'), ``α x' + s ε``, `[N, …]`."""
    return rows.noising_scale * full(x_next) + rows.noising_std * full(noise)
