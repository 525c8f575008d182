"""An exponential moving average of the trained weights, which smooths over what single updates throw them about.

After n updates that gave θ_1, …, θ_n it is ``Σ d^{n−k} θ_k / Σ d^{n−k}``: the weights before the first update do not
count, so no number of updates is too small for it. Of a LoRA, A and B are averaged each, and not their product.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of some parameters, in their dtype and on their device.

    Args:
        parameters: what is averaged, by name.
        decay: d, in (0, 1).
        changing: within which the parameters may be changed; see `fastnabla.models.policy.Policy.updating`.
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
        """Take in the parameters as they are after an update."""
        self.updates += 1
        share = (1 - self.decay) / (1 - self.decay**self.updates)
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the parameters have the average's values."""
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
        """For `torch.save`."""
        return {"updates": self.updates, "average": self.average}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            KeyError: a tensor is missing.
        """
        for name, average in self.average.items():
            saved: Tensor = state["average"][name]
            average.copy_(saved)
        self.updates = state["updates"]
