"""Times the gradient of a reward through the VAE decoder: diffusers' decoder with plain autograd against `Decoder`.

On CUDA: Stable Diffusion 1.5's decoder with random weights in bfloat16, 8 images of 512² in chunks of 1 to 8. On a CPU: a
decoder of three blocks in float32, 2 images of 128². The reward is the images' mean square. Before a decoder is timed, its
gradient is compared with one computed in a higher precision. The error may be at most ten times that of diffusers' decoder,
otherwise the benchmark fails. Configurations that do not fit into memory are skipped. Chunks of 4 come first in case time runs
out, and among them those that decide about layout and compilation.

- diffusers: `vae.decode`, without and with its own gradient checkpointing of the middle block and each up block.
- diffusers, channels last: with weights and latents in channels-last (CUDA).
- fastnabla: without and with checkpointing, in NCHW and channels-last, also compiled (CUDA, or a GPU run's dry run). In
  channels-last the Triton kernel computes the normalisations on CUDA, and with "plain" torch does.

`predicted MiB` is `decode_bytes` times the chunk, for eager execution without the Triton kernel; `peak MiB` is measured, without weights (CUDA).
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from bench import measure, rows
from fastnabla.models.decoder import Decoder, decode_bytes

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
DTYPE, HIGHER = (torch.bfloat16, torch.float32) if CUDA else (torch.float32, torch.float64)
WIDTHS, LAYERS, GROUPS = ((128, 256, 512, 512), 2, 32) if CUDA else ((32, 64, 64), 1, 8)
IMAGES, SHAPE = (8, (4, 64, 64)) if CUDA else (2, (4, 32, 32))
CHUNKS = (4, 1, 2, 8) if CUDA else (2, 1)


def reward(images: Tensor, prompts: list[str]) -> Tensor:
    return images.square().mean((1, 2, 3))


@functools.lru_cache(maxsize=1)
def build_vae(channels_last: bool = False, dtype: torch.dtype = DTYPE) -> AutoencoderKL:
    """The same random weights on every call."""
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * len(WIDTHS),
        "up_block_types": ("UpDecoderBlock2D",) * len(WIDTHS),
    }
    sizes = {"block_out_channels": WIDTHS, "layers_per_block": LAYERS, "norm_num_groups": GROUPS}
    vae = AutoencoderKL(**blocks, **sizes, latent_channels=4)
    return vae.to(DEVICE, dtype, memory_format=torch.channels_last if channels_last else torch.preserve_format)


class Diffusers(torch.nn.Module):
    """`reward_gradient` as it would be written with diffusers."""

    def __init__(self, chunk: int, checkpoint=False, channels_last=False, dtype=DTYPE) -> None:
        super().__init__()
        self.vae, self.chunk = build_vae(channels_last, dtype).requires_grad_(False).eval(), chunk
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        (self.vae.enable_gradient_checkpointing if checkpoint else self.vae.disable_gradient_checkpointing)()

    def reward_gradient(self, latents: Tensor, prompts: list[str], reward: Callable) -> tuple[Tensor, Tensor]:
        rewards, gradients = [], []
        for part in latents.split(self.chunk):
            part = part.detach().requires_grad_()
            scaled = (part / self.vae.config.scaling_factor).to(self.vae.dtype).contiguous(memory_format=self.layout)
            values = reward((self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1), prompts)
            gradients += torch.autograd.grad(values.sum(), part)
            rewards.append(values.detach())
        return torch.cat(rewards), torch.cat(gradients)


def ours(chunk: int, channels_last: bool = False, **settings: Any) -> Decoder:
    return Decoder(build_vae(channels_last), chunk, channels_last=channels_last, **settings)


DECODERS = {
    "fastnabla": ours,
    "fastnabla, channels last": functools.partial(ours, channels_last=True),
    "fastnabla, compiled, channels last": functools.partial(ours, channels_last=True, compile=True),
    "fastnabla, channels last, plain": functools.partial(ours, channels_last=True, backend="torch"),
    "fastnabla, compiled, channels last, plain": functools.partial(
        ours, channels_last=True, compile=True, backend="torch"
    ),
    "diffusers": Diffusers,
    "diffusers, channels last": functools.partial(Diffusers, channels_last=True),
    "fastnabla, compiled": functools.partial(ours, compile=True),
    "diffusers, checkpointed": functools.partial(Diffusers, checkpoint=True),
    "fastnabla, checkpointed": functools.partial(ours, checkpoint=True),
    "fastnabla, compiled, channels last, checkpointed": functools.partial(
        ours, channels_last=True, compile=True, checkpoint=True
    ),
}
ON_CPU = ("fastnabla", "diffusers", "diffusers, checkpointed", "fastnabla, checkpointed")
NAMES = DECODERS if CUDA or rows.is_dry() else ON_CPU


@functools.cache
def inputs() -> tuple[Tensor, list[str]]:
    latents = torch.randn(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(0))
    return 0.18 * latents.to(DEVICE), [""] * IMAGES


@functools.cache
def expected() -> tuple[Tensor, float]:
    """The gradient in the higher precision, and the error of diffusers' gradient in the benchmark's precision."""
    gradient = Diffusers(1, dtype=HIGHER).reward_gradient(*inputs(), reward)[1]
    return gradient, distance(Diffusers(1).reward_gradient(*inputs(), reward)[1], gradient)


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("chunk", "name"), list(itertools.product(CHUNKS, NAMES)))
def bench_decoder(benchmark, name: str, chunk: int) -> None:
    gradient, rounding = expected()
    torch.compiler.reset()  # otherwise the next chunk size recompiles with dynamic shapes
    decoder = DECODERS[name](chunk)

    def run() -> Tensor:
        return decoder.reward_gradient(*inputs(), reward)[1]

    try:
        start = time.perf_counter()
        error = distance(run(), gradient)
        first = time.perf_counter() - start
        peak = measure.peak_memory(run)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        pytest.skip(f"{chunk} images do not fit into {measure.device_info()['memory MiB']} MiB")
    assert error < 10 * rounding, f"{name}: the gradient's error is {error:.2g}, diffusers' is {rounding:.2g}"
    benchmark.group = f"{IMAGES} images of {8 * SHAPE[1] if CUDA else 4 * SHAPE[1]}², in chunks of {chunk}, {DTYPE}"
    benchmark.pedantic(measure.synchronised(run), rounds=5 if CUDA else 3, warmup_rounds=1)
    is_ours = name.startswith("fastnabla")
    predicted = decode_bytes(decoder.vae, SHAPE, DTYPE, "checkpointed" in name) if is_ours else None
    info = {"decoder": name, "chunk": chunk, "gradient error": error, "diffusers' error": rounding, "peak MiB": peak}
    info |= {"predicted MiB": predicted and chunk * predicted / 2**20, "images": IMAGES}
    if benchmark.stats is not None:  # None: --benchmark-disable
        info |= {"ms an image": 1e3 * benchmark.stats.stats.median / IMAGES, "first s": first}
    info["row"] = name if chunk == CHUNKS[0] else f"{name}, chunk {chunk}"
    benchmark.extra_info |= {**info, "device": measure.device_info()}
