"""The network's conditions: embeddings of the prompts, and inputs that all rows share."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Conditions(nn.Module):
    """Embeddings of P prompts, looked up by prompt index.

    Args:
        text: embeddings `[1 + P, L, D]`; row 0 is the unconditional embedding of classifier-free guidance.
        pooled: pooled embeddings `[1 + P, E]`, or None.
        shared: conditions of all rows, without the rows, such as Stable Diffusion XL's ``time_ids [6]``.
    """

    def __init__(self, text: Tensor, pooled: Tensor | None = None, shared: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)
        self.shared: list[str] = []
        self.share(shared or {})

    def share(self, shared: Mapping[str, Tensor]) -> None:
        """Add conditions that all rows share."""
        for name, value in shared.items():
            self.register_buffer(name, value.to(self.device), persistent=False)
            self.shared.append(name)

    @property
    def device(self) -> torch.device:
        """The embeddings' device."""
        return self.text.device

    @property
    def width(self) -> int:
        """Width D of the text embeddings."""
        return self.text.shape[-1]

    def ensure(self, prompt: Tensor) -> None:
        """Make the embeddings of prompt indices `prompt [N]`, on the host, available. Here they always are."""

    def forward(self, prompt: Tensor, guided: bool) -> dict[str, Tensor]:
        """Conditions, `[N, …]` each, for prompt indices `prompt [N]`, as `Family.call` takes them.

        If `guided`, N unconditional rows come first.
        """
        rows = self._rows(prompt)
        if guided:
            rows = torch.cat([torch.zeros_like(prompt), rows])
        conditions = {"text": self.text[rows]}
        if self.pooled is not None:
            conditions["pooled"] = self.pooled[rows]
        for name in self.shared:
            value = getattr(self, name)
            conditions[name] = value.expand(len(rows), *value.shape)
        return conditions

    def of_prompts(self, prompt: Tensor) -> Tensor:
        """Text embeddings `[N, L, D]` of prompt indices `prompt [N]`."""
        return self.text[self._rows(prompt)]

    def _rows(self, prompt: Tensor) -> Tensor:
        return prompt + 1
