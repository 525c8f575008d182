"""Counts the passes of a network: the cost model's unit U is one forward pass of one guided sample."""

from torch import Tensor


class PassCounter:
    """Counts network passes in `rows`: a forward or a backward pass of N guided samples adds N. It adds half for samples without
    guidance, where the policy has guidance."""

    def __init__(self) -> None:
        self.rows: float = 0

    def watch(self, output: Tensor, rows: float) -> Tensor:
        """Count the forward pass that produced `output`, and every backward pass that starts from it."""
        self.rows += rows
        return self.watch_backward(output, rows)

    def watch_backward(self, output: Tensor, rows: float) -> Tensor:
        """Count every backward pass that starts from `output`."""
        if output.requires_grad:
            output.register_hook(lambda _: self._count(rows))
        return output

    def _count(self, rows: float) -> None:
        self.rows += rows
