"""An exponential moving average (EMA) of the trained weights, which smooths out the noise of single updates.

After n updates with the results θ_1, …, θ_n it is ``Σ d^{n−k} θ_k / Σ d^{n−k}``. The weights before the first update do not
count, so the average is unbiased after any number of updates. A LoRA's A and B are averaged, not their product.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastnabla.utils.same_tensors import require_same_tensors


class WeightAverage:
    """The average of some parameters, in their dtype and on their device.

    Args:
        parameters: parameters to average, by name.
        decay: d, in (0, 1).
        changing: the context in which the parameters may be changed, `fastnabla.models.policy.Policy.updating`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decay: float,
        changing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.parameters, self.decay, self.changing, self.updates = parameters, decay, changing, 0
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Average in the current parameters. Call it after each update."""
        self.updates += 1
        weight = (1 - self.decay) / (1 - self.decay**self.updates)
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), weight)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context, the parameters hold the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        with self.changing():
            for name, parameter in self.parameters.items():
                values = parameter.clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(values)

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates, for `torch.save`."""
        return {"updates": self.updates, "average": self.average}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            KeyError: there is no average.
            ValueError: its tensors have other names or shapes.
        """
        require_same_tensors(state["average"], self.average)
        for name, average in self.average.items():
            average.copy_(state["average"][name])
        self.updates = state["updates"]
