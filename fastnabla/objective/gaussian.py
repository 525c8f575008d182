"""One step of a sampler, ``P(x'|x) = N(a x + b o, σ² I)``, as a draw, a density and a score, in plain torch.

Shapes: N rows, states `[N, …]`; network outputs come as classifier-free guidance *pairs* `[2N, …]`, all
unconditional rows first, or `[N, …]` when there is no guidance (`guidance_scale=None`). `rows` are rows of a
`TransitionTable`. The arithmetic is float32 (float64 if the inputs are).
"""

import math

import torch
from torch import Tensor

from fastnabla.transition import TransitionRows


def full(tensor: Tensor) -> Tensor:
    """`tensor` in the precision of the arithmetic: float32, or float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def guide(output: Tensor, guidance_scale: float | None) -> Tensor:
    """Classifier-free guidance ``o = u + w (c − u)`` of a pair `[2N, …]`, as `[N, …]`; no guidance if w is None."""
    if guidance_scale is None:
        return full(output)
    unconditional, conditional = full(output).chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def unguide(cotangent: Tensor, guidance_scale: float | None) -> Tensor:
    """The adjoint of `guide`: a cotangent `[N, …]` of o as the cotangent `[2N, …]` of the pair."""
    if guidance_scale is None:
        return cotangent
    return torch.cat([(1 - guidance_scale) * cotangent, guidance_scale * cotangent])


def step_score(o: Tensor, x: Tensor, x_next: Tensor, rows: TransitionRows) -> Tensor:
    """``s = ∇_{x'} log P = −(x' − a x − b o) / σ²`` of a guided output `o [N, …]`, as the paper writes it."""
    return -(full(x_next) - rows.a * full(x) - rows.b * full(o)) / rows.sigma**2


def gaussian_log_prob(
    output: Tensor, x: Tensor, x_next: Tensor, rows: TransitionRows, *, guidance_scale: float | None
) -> Tensor:
    """``log N(x'; a x + b o, σ² I)`` by row `[N]`: the log-density of the whole state, a sum over its elements.

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
