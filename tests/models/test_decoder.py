"""The decoder's images and reward gradients against diffusers' decoder, in every way of computing them."""

import copy
import functools
import itertools
import os

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastnabla.models.decoder import Decoder, LiveBytes
from tests.checks import randn, relative_error
from tests.kernel_cases import CPU, GPU, on_each_device

PROMPTS = ["a", "b", "c", "d"]
ONE_BLOCK = {
    "block_out_channels": (16,),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
}


def build_vae(**changes) -> AutoencoderKL:
    """16 × 16 latents to 64 × 64 images."""
    torch.manual_seed(0)
    config = {"block_out_channels": (16, 32, 32), "latent_channels": 4, "norm_num_groups": 8, "layers_per_block": 1}
    config |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(**{**config, "scaling_factor": 0.5, **changes}).requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return build_vae()


@pytest.fixture(scope="module")
def tiny() -> AutoencoderTiny:
    """8 × 8 latents to 32 × 32 images."""
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))


def reward(images: Tensor, prompts: list[str]) -> Tensor:
    """Depends on the prompt, so that a gradient of the wrong one shows."""
    weights = torch.tensor([1.0 + PROMPTS.index(prompt) for prompt in prompts], device=images.device)
    return weights * images.square().mean((1, 2, 3))


def plain_gradient(vae: AutoencoderKL, latents: Tensor) -> tuple[Tensor, Tensor]:
    latents = latents.clone().requires_grad_()
    decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
    rewards = reward((decoded.float() / 2 + 0.5).clamp(0, 1), PROMPTS)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": 2, "block_out_channels": (32, 16, 32)},
        {"mid_block_add_attention": False},
        {"use_post_quant_conv": False},
        ONE_BLOCK,
    ],
    ids=["layers", "no attention", "no post_quant_conv", "one block"],
)
@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "kept"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "NCHW"])
def test_shapes_of_decoders(changes, channels_last, checkpoint):
    vae, latents = build_vae(**changes), randn(4, 4, 16, 16)
    rewards, gradient = plain_gradient(vae, latents)
    decoder = Decoder(vae, checkpoint=checkpoint, channels_last=channels_last)
    actual = decoder.reward_gradient(latents, PROMPTS, reward)
    torch.testing.assert_close(actual[0], rewards, rtol=1e-5, atol=0)
    assert relative_error(actual[1], gradient) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "compile", "channels_last", "device"),
    [
        pytest.param(*ways, *device.values, marks=device.marks)
        for ways in itertools.product((True, False), repeat=3)
        for device in (CPU, GPU)
        if device is GPU or not ways[1] or ways[0] == ways[2]  # the others are in `test_compiled`
    ],
)
def test_gradient_in_every_way_of_computing(checkpoint, compile, channels_last, device, monkeypatch):
    """Equal to eager diffusers', to float32 rounding, and not zero. Code is generated on a GPU only."""
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae, latents = build_vae(**ONE_BLOCK).to(device), randn(4, 4, 8, 8).to(device)
    rewards, gradient = plain_gradient(vae, latents)
    torch._dynamo.reset()
    decoder = Decoder(vae, None, checkpoint, compile, channels_last)
    actual = decoder.reward_gradient(latents, PROMPTS, reward)
    assert actual[1].abs().max() > 0
    tolerance = 1e-5 if device == "cpu" else 1e-4  # cuDNN may transform its operands (Winograd)
    torch.testing.assert_close(actual[0], rewards, rtol=tolerance, atol=0)
    assert relative_error(actual[1], gradient) < tolerance


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU, every test of channels-last runs it")
@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "kept"])
def test_normalisations_by_the_kernel(checkpoint):
    """In Triton's interpreter: equal to plain torch, to float32 rounding."""
    two_blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = build_vae(block_out_channels=(8, 12), norm_num_groups=2, **two_blocks)
    latents = randn(1, 4, 3, 5)
    plain, kernel = (
        Decoder(vae, None, checkpoint, channels_last=True, backend=backend).reward_gradient(
            latents, PROMPTS[:1], reward
        )
        for backend in ("torch", "triton")
    )
    for ours, torchs in zip(kernel, plain, strict=True):
        assert relative_error(ours, torchs) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "channels_last"), [(True, False), (False, True)], ids=["checkpoint-NCHW", "kept-channels-last"]
)
def test_compiled(checkpoint, channels_last, monkeypatch):
    """One graph for each of: two numbers of images with gradients, and without; left to eager kernels here.

    Without comes first, as in a run, whose rollout is decoded before anything is differentiated.
    """
    two_blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = build_vae(block_out_channels=(8, 16), mid_block_add_attention=channels_last, **two_blocks)
    latents = randn(4, 4, 8, 8)
    rewards, gradient = plain_gradient(vae, latents)
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    torch._dynamo.reset()
    decoder = Decoder(vae, 3, checkpoint, True, channels_last)
    images = decoder.decode(latents)
    actual = decoder.reward_gradient(latents, PROMPTS, reward)
    torch.testing.assert_close(actual[0], rewards, rtol=1e-5, atol=0)
    assert relative_error(actual[1], gradient) < 1e-5
    torch.testing.assert_close(images, Decoder(vae).decode(latents), rtol=0, atol=1e-5)
    assert 2 <= graphs.frame_count <= 4


def test_checkpointing_changes_no_bit(vae):
    latents = randn(4, 4, 16, 16)
    kept, recomputed = (Decoder(vae, 2, checkpoint).reward_gradient(latents, PROMPTS, reward) for checkpoint in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_decode(vae):
    latents = randn(4, 4, 16, 16)
    decoder = Decoder(vae, 3)
    images = decoder.decode(latents)
    assert images.shape == (4, 3, 64, 64)
    assert 0 <= images.min() <= images.max() <= 1
    torch.testing.assert_close(images, decoder(latents).detach(), rtol=0, atol=1e-5)
    expected = (vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "NCHW"])
def test_bfloat16(channels_last, device):
    """No further from float32 than twice diffusers' own decoder in bfloat16."""
    exact, vae, latents = build_vae().to(device), build_vae().to(device).bfloat16(), randn(4, 4, 16, 16).to(device)
    _, expected = plain_gradient(exact, latents)
    _, plain = plain_gradient(vae, latents)
    decoder = Decoder(vae, channels_last=channels_last)
    rewards, gradient = decoder.reward_gradient(latents.bfloat16(), PROMPTS, reward)
    assert (rewards.dtype, gradient.dtype) == (torch.float32, torch.float32)
    assert relative_error(gradient, expected) < 2 * relative_error(plain, expected)


def test_works_where_gradients_are_off(vae):
    latents = randn(4, 4, 16, 16)
    with torch.no_grad():
        _, gradient = Decoder(vae).reward_gradient(latents, PROMPTS, reward)
    assert gradient.abs().max() > 0


def test_a_reward_without_gradient(vae):
    with pytest.raises(RuntimeError, match="does not require grad"):
        Decoder(vae).reward_gradient(randn(1, 4, 16, 16), ["a"], lambda images, prompts: images.detach().sum((1, 2, 3)))


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "kept"])
def test_out_of_memory(vae, checkpoint):
    """It passes through, frees everything, and leaves a decoder that works."""
    decoder, latents = Decoder(vae, 1, checkpoint), randn(4, 4, 16, 16)
    expected = decoder.reward_gradient(latents, PROMPTS, reward)

    def failing(images: Tensor, prompts: list[str]) -> Tensor:
        if prompts == ["c"]:
            raise torch.OutOfMemoryError("a third image")
        return reward(images, prompts)

    with LiveBytes() as memory:
        with pytest.raises(torch.OutOfMemoryError, match="a third image") as caught:
            decoder.reward_gradient(latents, PROMPTS, failing)
        assert memory.live > 0  # held by the traceback
        del caught
        assert memory.live == 0
    assert all(map(torch.equal, decoder.reward_gradient(latents, PROMPTS, reward), expected))


@pytest.mark.slow
def test_the_host_waits_for_nothing(vae):
    """Fake tensors have no values: what reads one on the host fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder, latents = Decoder(vae, 3), torch.empty(4, 4, 16, 16)
        _, gradient = decoder.reward_gradient(latents, PROMPTS, lambda images, prompts: images.sum((1, 2, 3)))
        assert gradient.shape == latents.shape
        with pytest.raises(DataDependentOutputException):
            decoder.reward_gradient(
                latents, PROMPTS, lambda images, prompts: images.sum((1, 2, 3)) * images[0].sum().item()
            )


def test_unsupported():
    with pytest.raises(ValueError, match="this Linear cannot be decoded"):
        Decoder(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="this AutoencoderKL cannot be decoded"):
        Decoder(build_vae(act_fn="gelu"))
    with pytest.raises(ValueError, match="this AutoencoderKL cannot be decoded"):
        Decoder(build_vae(up_block_types=("AttnUpDecoderBlock2D",) * 3))


def test_tiny_images(tiny):
    """What StableDiffusionPipeline makes of the same latents, with this autoencoder as its own."""
    latents = 3 * randn(2, 4, 8, 8)
    decoded = tiny.decode(latents / tiny.config.scaling_factor).sample.detach()
    expected = VaeImageProcessor(vae_scale_factor=4).postprocess(decoded, output_type="pt")
    images = Decoder(tiny, 1).decode(latents)
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert 0 <= images.min() <= images.max() <= 1


def test_tiny_gradient(tiny):
    """By central differences in float64; the images, and so the gradient, are rounded to float32."""
    decoder, latents = Decoder(copy.deepcopy(tiny).double()), randn(1, 4, 8, 8)
    direction, step = randn(1, 4, 8, 8, seed=1), 1e-5
    _, gradient = decoder.reward_gradient(latents, ["a"], reward)

    def value(shift: float) -> Tensor:
        images = decoder.vae.decode(latents.double() + shift * direction.double()).sample
        return (images / 2 + 0.5).clamp(0, 1).square().mean()

    expected = (value(step) - value(-step)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum().double(), expected, rtol=1e-5, atol=0)


def test_tiny_gradient_vanishes_far_out(tiny):
    """3 tanh(z / 3): at z = 30 its slope is 1 - tanh(10)² < 1e-8."""
    _, near = Decoder(tiny).reward_gradient(torch.ones(1, 4, 8, 8), ["a"], reward)
    _, far = Decoder(tiny).reward_gradient(torch.full((1, 4, 8, 8), 30.0), ["a"], reward)
    assert far.abs().max() < 1e-6 * near.abs().max()


def test_tiny_is_not_checkpointed(tiny):
    with pytest.raises(ValueError, match="AutoencoderTiny keeps few activations"):
        Decoder(tiny, checkpoint=True)
