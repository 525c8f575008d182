"""The policy: a diffusers UNet with a LoRA. With the LoRA off it is the reference policy."""

import contextlib
from collections.abc import Iterator

import torch
from peft import LoraConfig
from torch import Tensor, nn

ADAPTER = "policy"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class PassCounter:
    """Counts network passes by rows: a forward or a backward of N guided samples adds N."""

    def __init__(self) -> None:
        self.rows = 0

    def watch(self, output: Tensor, rows: int) -> Tensor:
        """Count the forward pass that made `output`, and every backward pass that enters it."""
        self.rows += rows
        if output.requires_grad:
            output.register_hook(lambda _: self._count(rows))
        return output

    def _count(self, rows: int) -> None:
        self.rows += rows


class Policy(nn.Module):
    """Guided outputs of the finetuned and of the reference policy.

    Args:
        unet: a frozen `UNet2DConditionModel` without adapters; a LoRA is added to it.
        conditions: text embeddings `[1 + P, L, D]`, row 0 that of the empty prompt.
        guidance_scale: w of classifier-free guidance; None or 1 runs the conditional rows alone.
        rank: rank of the LoRA, which is also its alpha.
        targets: names of the layers that get one.
    """

    def __init__(
        self,
        unet: nn.Module,
        conditions: Tensor,
        guidance_scale: float | None,
        rank: int = 8,
        targets: tuple[str, ...] = LORA_TARGETS,
    ) -> None:
        super().__init__()
        self.unet = unet.requires_grad_(False).eval()
        self.register_buffer("conditions", conditions, persistent=False)
        self.guidance_scale = None if guidance_scale == 1 else guidance_scale
        lora = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
        unet.add_adapter(lora, adapter_name=ADAPTER)
        for parameter in self.trainable():
            parameter.data = parameter.data.float()
        self.passes = PassCounter()

    def trainable(self) -> list[nn.Parameter]:
        """The LoRA's parameters, float32."""
        return [p for p in self.unet.parameters() if p.requires_grad]

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """Output pair `[2N, …]` (unconditional rows first; `[N, …]` without guidance) in the UNet's dtype.

        Args:
            x: states `[N, C, H, W]`.
            timestep: `[N]` int64.
            prompt: `[N]` int64, prompt numbers from 0.
        """
        return self._network(x, timestep, prompt)

    def reference(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """The same of the pretrained policy."""
        with self.adapter_off():
            return self._network(x, timestep, prompt)

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Within, `forward` is the reference policy."""
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    def _network(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        rows, x = len(x), x.to(self.unet.dtype)
        condition = prompt + 1
        if self.guidance_scale is not None:
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
            condition = torch.cat([torch.zeros_like(prompt), condition])
        output = self.unet(x, timestep, encoder_hidden_states=self.conditions[condition], return_dict=False)[0]
        return self.passes.watch(output, rows)
