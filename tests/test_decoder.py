import weakref

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnabla.decoder import Decoder
from tests.checks import randn, relative_error

PROMPTS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """16 × 16 latents to 64 × 64 images."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        scaling_factor=0.5,
    )


def reward(images: Tensor, prompts: list[str]) -> Tensor:
    """Depends on the prompt, so that a gradient of the wrong one shows."""
    weights = torch.tensor([1.0 + PROMPTS.index(prompt) for prompt in prompts])
    return weights * images.square().mean((1, 2, 3))


def plain_gradient(vae: AutoencoderKL, latents: Tensor) -> tuple[Tensor, Tensor]:
    vae.requires_grad_(False).disable_gradient_checkpointing()
    latents = latents.clone().requires_grad_()
    images = (vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    rewards = reward(images, PROMPTS)
    return rewards.detach(), torch.autograd.grad(rewards.sum(), latents)[0]


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "kept"])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_reward_gradient(vae, chunk, checkpoint):
    """Equal to plain autograd, to the rounding of convolutions that sum in another order for another batch."""
    latents = randn(4, 4, 16, 16)
    rewards, gradient = plain_gradient(vae, latents)
    actual = Decoder(vae, chunk, checkpoint).reward_gradient(latents, PROMPTS, reward)
    torch.testing.assert_close(actual[0], rewards, rtol=1e-5, atol=0)
    assert relative_error(actual[1], gradient) < 1e-5
    assert not latents.requires_grad
    assert not any(tensor.requires_grad for tensor in actual)


def test_decode(vae):
    latents = randn(4, 4, 16, 16)
    decoder = Decoder(vae, 3)
    images = decoder.decode(latents)
    assert images.shape == (4, 3, 64, 64)
    assert 0 <= images.min() <= images.max() <= 1
    torch.testing.assert_close(images, decoder(latents).detach(), rtol=0, atol=1e-5)
    expected = (vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected.detach(), rtol=0, atol=1e-5)


def test_low_precision_latents(vae):
    rewards, gradient = Decoder(vae).reward_gradient(randn(4, 4, 16, 16).bfloat16(), PROMPTS, reward)
    assert (rewards.dtype, gradient.dtype) == (torch.float32, torch.float32)


def test_works_where_gradients_are_off(vae):
    latents = randn(4, 4, 16, 16)
    with torch.no_grad():
        _, gradient = Decoder(vae).reward_gradient(latents, PROMPTS, reward)
    assert gradient.abs().max() > 0


def test_a_reward_without_gradient(vae):
    with pytest.raises(RuntimeError, match="does not require grad"):
        Decoder(vae).reward_gradient(randn(1, 4, 16, 16), ["a"], lambda images, prompts: images.detach().sum((1, 2, 3)))


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive; `peak` is their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def peak_bytes(vae: AutoencoderKL, chunk: int | None, checkpoint: bool) -> int:
    decoder = Decoder(vae, chunk, checkpoint)
    with LiveBytes() as memory:
        decoder.reward_gradient(randn(4, 4, 16, 16), PROMPTS, reward)
    return memory.peak


def test_memory(vae):
    """Four images. Measured, as shares of the peak of plain autograd: 0.57, 0.25 and 0.14."""
    plain = peak_bytes(vae, None, False)
    for chunk, checkpoint, share in ((None, True, 0.75), (1, False, 0.4), (1, True, 0.25)):
        assert peak_bytes(vae, chunk, checkpoint) < share * plain
