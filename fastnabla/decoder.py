"""From latents to images to rewards, and back: the gradient of a reward through the VAE decoder.

The decoder's activations are by far the largest of a training step (at 512² some 4 GB per image). They are
never held for more than `chunk` images, and within those recomputed block by block in the backward pass.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

RewardFunction = Callable[[Tensor, Sequence[str]], Tensor]


class Decoder(nn.Module):
    """A diffusers `AutoencoderKL`'s decoder with bounded memory.

    Args:
        vae: the autoencoder, frozen here.
        chunk: most images decoded at once; None for all.
        checkpoint: recompute the decoder's blocks in the backward pass instead of keeping their activations.
    """

    def __init__(self, vae: nn.Module, chunk: int | None = None, checkpoint: bool = True) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False).eval()
        self.chunk = chunk
        if checkpoint:
            vae.enable_gradient_checkpointing()
        else:
            vae.disable_gradient_checkpointing()

    def forward(self, latents: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` in [0, 1], float32, of `latents [N, C, h, w]` as the sampler leaves them."""
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0)
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """`forward` in chunks, without gradients."""
        return torch.cat([self(part) for part in latents.split(self.chunk or len(latents))])

    def reward_gradient(self, latents: Tensor, prompts: Sequence[str], reward: RewardFunction) -> tuple[Tensor, Tensor]:
        """Rewards `[N]` of the decoded `latents` and their gradients `[N, C, h, w]` in the latents, both float32.

        Args:
            latents: `[N, C, h, w]`; clean latents, or one-step predictions of them.
            prompts: the N prompts.
            reward: images `[B, 3, H, W]` in [0, 1] and B prompts to `[B]` rewards, differentiable.

        Raises:
            RuntimeError: the reward has no gradient in the images (from autograd).
        """
        rewards, gradients = [], []
        size = self.chunk or len(latents)
        for start in range(0, len(latents), size):
            part = latents[start : start + size].detach().float().requires_grad_()
            with torch.enable_grad():
                values = reward(self(part), prompts[start : start + size])
                (gradient,) = torch.autograd.grad(values.sum(), part)
            rewards.append(values.detach().float())
            gradients.append(gradient)
        return torch.cat(rewards), torch.cat(gradients)
