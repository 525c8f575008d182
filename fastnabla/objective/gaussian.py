"""One step of a sampler, ``P(x'|x) = N(a x + b o, σ² I)``, as a draw, a density and a score, in plain torch.

Shapes: N rows; states are `[N, …]`. Network outputs are classifier-free guidance *pairs* `[2N, …]` with all unconditional
rows first, or `[N, …]` without guidance (`guidance_scale=None`). `rows` are rows of a `TransitionTable`. The arithmetic is
float32, or float64 for float64 inputs.
"""

import math

import torch
from torch import Tensor

from fastnabla.transition import TransitionRows


def full(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype of the arithmetic: float32, or float64 if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def guide(output: Tensor, guidance_scale: float | None) -> Tensor:
    """Classifier-free guidance ``o = u + w (c − u)`` of a pair `[2N, …]`, as `[N, …]`. With w None there is no guidance."""
    if guidance_scale is None:
        return full(output)
    unconditional, conditional = full(output).chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def unguide(cotangent: Tensor, guidance_scale: float | None) -> Tensor:
    """The adjoint of `guide`: maps a cotangent of o `[N, …]` to the cotangent of the pair `[2N, …]`."""
    if guidance_scale is None:
        return cotangent
    return torch.cat([(1 - guidance_scale) * cotangent, guidance_scale * cotangent])


def step_score(o: Tensor, x: Tensor, x_next: Tensor, rows: TransitionRows) -> Tensor:
    """``s = ∇_{x'} log P = −(x' − a x − b o) / σ²`` of a guided output `o [N, …]`, in the paper's form."""
    return -(full(x_next) - rows.a * full(x) - rows.b * full(o)) / rows.sigma**2


def gaussian_log_prob(
    output: Tensor, x: Tensor, x_next: Tensor, rows: TransitionRows, *, guidance_scale: float | None
) -> Tensor:
    """``log N(x'; a x + b o, σ² I)`` by row `[N]`: the log-density of the whole state, summed over its elements.

    Gradients flow to `output`, `x` and `x_next`.
    """
    noise = (full(x_next) - rows.a * full(x) - rows.b * guide(output, guidance_scale)) / rows.sigma
    normaliser = rows.sigma.log() + 0.5 * math.log(2 * math.pi)
    return -(0.5 * noise.square() + normaliser).flatten(1).sum(1)


def guided_step(
    output: Tensor, x: Tensor, noise: Tensor, rows: TransitionRows, *, guidance_scale: float | None
) -> tuple[Tensor, Tensor]:
    """``x' = a x + b o + σ ε``, in the dtype of `x`, and the guided output o, both `[N, …]`."""
    o = guide(output, guidance_scale)
    x_next = rows.a * full(x) + rows.b * o + rows.sigma * full(noise)
    return x_next.to(x.dtype), o
