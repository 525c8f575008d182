"""The UNet's conditioning inputs: prompt embeddings, Stable Diffusion XL's pooled embeddings and sizes, and the embedding of
the guidance scale."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn


class Conditions(nn.Module):
    """Embeddings of P prompts, looked up by prompt index.

    Args:
        text: embeddings `[1 + P, L, D]`; row 0 is the unconditional embedding of classifier-free guidance.
        pooled: Stable Diffusion XL's pooled embeddings `[1 + P, E]`, or None.
        time_ids: Stable Diffusion XL's original size, crop and target size `[6]`, or None.
    """

    def __init__(self, text: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)
        self.register_buffer("time_ids", time_ids, persistent=False)

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

    def forward(self, prompt: Tensor, guided: bool) -> dict[str, Any]:
        """Keyword arguments of diffusers' `UNet2DConditionModel` for prompt indices `prompt [N]`.

        If `guided`, N unconditional rows come first.
        """
        rows = self._rows(prompt)
        if guided:
            rows = torch.cat([torch.zeros_like(prompt), rows])
        arguments: dict[str, Any] = {"encoder_hidden_states": self.text[rows]}
        if self.pooled is not None:
            time_ids = self.time_ids.expand(len(rows), -1)
            arguments["added_cond_kwargs"] = {"text_embeds": self.pooled[rows], "time_ids": time_ids}
        return arguments

    def of_prompts(self, prompt: Tensor) -> Tensor:
        """Text embeddings `[N, L, D]` of prompt indices `prompt [N]`."""
        return self.text[self._rows(prompt)]

    def _rows(self, prompt: Tensor) -> Tensor:
        return prompt + 1


def guidance_embedding(unet: nn.Module, guidance_scale: float | None) -> Tensor | None:
    """Embedding `[time_cond_proj_dim]`, float32, of the guidance scale w, for a UNet that takes w as an input because guidance
    was distilled into it (arXiv 2210.03142). It is the embedding of w − 1, as in diffusers' pipelines. None for other UNets.

    Args:
        unet: diffusers' `UNet2DConditionModel`.
        guidance_scale: w; None for 1.
    """
    size = getattr(unet, "config", {}).get("time_cond_proj_dim")
    if size is None:
        return None
    scale = torch.tensor([(1 if guidance_scale is None else guidance_scale) - 1])
    return StableDiffusionPipeline.get_guidance_scale_embedding(None, scale, size)[0]
