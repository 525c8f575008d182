"""g_φ, the learned part of the flow score ``∇log F̃(x) = βγ∇r(x) + g_φ(x)``. By default it is initialised to zero."""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from fastnabla.objective.gaussian import full


class UNetFlow(nn.Module):
    """A small text-conditioned UNet, as in the reference implementation.

    Args:
        channels: C of the states.
        text_width: D of the text embeddings.
        widths: channels of the UNet's levels.
    """

    def __init__(self, channels: int, text_width: int, widths: tuple[int, ...] = (64, 128, 256, 256)) -> None:
        super().__init__()
        deep = len(widths) - 1
        self.unet = UNet2DConditionModel(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            down_block_types=("CrossAttnDownBlock2D",) * deep + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * deep,
            layers_per_block=1,
            cross_attention_dim=text_width,
            norm_num_groups=min(32, widths[0] // 2),
        )
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, x: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        """g `[N, C, H, W]`, float32 (float64 if network and inputs are).

        Args:
            x: states `[N, C, H, W]`.
            timestep: `[N]`.
            embeddings: prompt embeddings `[N, L, D]`.
        """
        return self.unet(full(x), timestep, encoder_hidden_states=full(embeddings), return_dict=False)[0]


class ConvFlow(nn.Module):
    """A light alternative: four convolutions modulated by the timestep and the mean prompt embedding."""

    def __init__(self, channels: int, text_width: int, width: int = 32) -> None:
        super().__init__()
        self.embed = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(width, width)
        self.text = nn.Linear(text_width, width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.modulate = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        """As `UNetFlow.forward`."""
        embeddings = full(embeddings)
        condition = self.time(self.embed(timestep).to(embeddings.dtype)) + self.text(embeddings.mean(1))
        h = self.first(full(x))
        for convolution, modulation in zip(self.middle, self.modulate, strict=True):
            scale, shift = modulation(nn.functional.silu(condition))[..., None, None].chunk(2, 1)
            h = h + convolution(nn.functional.silu(h) * (1 + scale) + shift)
        return self.last(nn.functional.silu(h))


def build_flow(kind: str, channels: int, text_width: int, seed: int, start: str = "zero") -> nn.Module | None:
    """A new flow network, or None for the kind "none".

    Args:
        kind: "unet", "conv" or "none".
        channels: C of the states.
        text_width: D of the text embeddings.
        seed: of the initial weights, which depend only on it.
        start: "zero" initialises the last layer's weights to zero, "random" to PyTorch's default; its bias is zero.
    """
    if kind == "none":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = UNetFlow(channels, text_width) if kind == "unet" else ConvFlow(channels, text_width)
        if start == "random":
            last = flow.unet.conv_out if kind == "unet" else flow.last
            last.reset_parameters()
            nn.init.zeros_(last.bias)
    return flow
