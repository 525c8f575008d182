"""A function as one node of the graph, so that its backward pass can be surrounded by a context.

A backward pass runs after the function has returned, among those of everything else. The node has a graph of its own, which is
differentiated in the node's backward pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Context = Callable[[], AbstractContextManager[Any]]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], forward: Context, backward: Context
    ) -> Tensor:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad(), forward():
            values = function(leaf)
        ctx.graph, ctx.context = (leaf, values), backward
        result = values.detach()
        if not values.requires_grad:
            ctx.mark_non_differentiable(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        if ctx.graph is None:
            raise RuntimeError("a reward's gradient can be taken once per call; retain_graph has no effect on it.")
        (leaf, values), ctx.graph = ctx.graph, None
        with ctx.context():
            (x_gradient,) = torch.autograd.grad(values, leaf, gradient, allow_unused=True)
        return x_gradient, None, None, None


def as_one_node(function: Callable[[Tensor], Tensor], x: Tensor, forward: Context, backward: Context) -> Tensor:
    """`function(x)`, computed within `forward()` and differentiated within `backward()`.

    Args:
        function: differentiable; everything else that it uses is treated as constant.
        x: its argument.
        forward, backward: make the contexts.

    Raises:
        RuntimeError: in a second backward pass through the result, or when differentiating its gradient.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Node.apply(x, function, forward, backward)
    with forward():
        return function(x)
