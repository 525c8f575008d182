"""What a UNet is told besides state and timestep."""

from typing import Any

import torch
from torch import Tensor, nn


class Conditions(nn.Module):
    """The prompts as the UNet sees them, by number.

    Args:
        text: embeddings `[1 + P, L, D]`; row 0 is the unconditional one of classifier-free guidance.
        pooled: Stable Diffusion XL's pooled embeddings `[1 + P, E]`, or None.
        time_ids: its `[6]` numbers of original size, crop and target size, or None.
    """

    def __init__(self, text: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)
        self.register_buffer("time_ids", time_ids, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.text.device

    @property
    def width(self) -> int:
        """D."""
        return self.text.shape[-1]

    def ensure(self, prompt: Tensor) -> None:
        """Call it before prompt numbers `prompt [N]`, on the host, are asked for: here all are there always."""

    def forward(self, prompt: Tensor, guided: bool) -> dict[str, Any]:
        """Arguments of a diffusers `UNet2DConditionModel` for prompt numbers `prompt [N]`, from 0; `guided` by as many
        unconditional rows first."""
        rows = self._rows(prompt)
        if guided:
            rows = torch.cat([torch.zeros_like(prompt), rows])
        arguments: dict[str, Any] = {"encoder_hidden_states": self.text[rows]}
        if self.pooled is not None:
            time_ids = self.time_ids.expand(len(rows), -1)
            arguments["added_cond_kwargs"] = {"text_embeds": self.pooled[rows], "time_ids": time_ids}
        return arguments

    def of_prompts(self, prompt: Tensor) -> Tensor:
        """Text embeddings `[N, L, D]` of prompt numbers `prompt [N]`, from 0."""
        return self.text[self._rows(prompt)]

    def _rows(self, prompt: Tensor) -> Tensor:
        return prompt + 1
