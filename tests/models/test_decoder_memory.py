"""The decoder's memory: counted on shapes, and measured as the resident set of a process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastnabla.models.decoder import Decoder, decode_bytes, with_empty_weights
from fastnabla.utils.tensor_bytes import LiveBytes

pytestmark = pytest.mark.slow

LATENTS = (4, 64, 64)


def build_vae(*widths: int, layers: int, groups: int) -> AutoencoderKL:
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    sizes = {"block_out_channels": widths, "layers_per_block": layers, "norm_num_groups": groups}
    return AutoencoderKL(**blocks, **sizes, latent_channels=4).requires_grad_(False)


def sd15_vae() -> AutoencoderKL:
    """Stable Diffusion 1.5's autoencoder, without values."""
    with torch.device("meta"):
        return build_vae(128, 256, 512, 512, layers=2, groups=32)


@pytest.fixture(scope="module")
def stable_diffusion() -> AutoencoderKL:
    return sd15_vae()


def total(images: Tensor, prompts: list[str]) -> Tensor:
    return images.sum((1, 2, 3))


def plain_gradient(vae: AutoencoderKL, latents: Tensor) -> None:
    """By plain autograd through diffusers' decoder."""
    latents = latents.clone().requires_grad_()
    images = (vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
    torch.autograd.grad(total(images, []).sum(), latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stable_diffusion(stable_diffusion, dtype):
    """Counted, as shares of the peak of plain autograd: 0.37, and 0.27 with checkpointing."""
    with FakeTensorMode():
        plain, latents = with_empty_weights(stable_diffusion, dtype), torch.empty(1, *LATENTS)
        with LiveBytes() as memory:
            plain_gradient(plain, latents)
    assert decode_bytes(stable_diffusion, LATENTS, dtype) < 0.4 * memory.peak
    assert decode_bytes(stable_diffusion, LATENTS, dtype, checkpoint=True) < 0.29 * memory.peak


@pytest.mark.parametrize(
    ("checkpoint", "how", "kept", "peak"),
    [
        (False, "NCHW", 898, 1020),
        (False, "channels-last", 898, 1020),
        (False, "kernel", 898, 959),
        (True, "NCHW", 606, 728),
        (True, "channels-last", 606, 728),
        (True, "kernel", 606, 667),
    ],
)
def test_bytes_in_either_layout(stable_diffusion, checkpoint, how, kept, peak, monkeypatch):
    """In MiB, in bfloat16: what docs/performance.md says. The plain one is planned with."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the kernel's results are counted, nothing is computed
    with FakeTensorMode():
        vae = with_empty_weights(stable_diffusion, torch.bfloat16)
        backend = "triton" if how == "kernel" else "torch"
        decoder = Decoder(vae, None, checkpoint, channels_last=how != "NCHW", backend=backend)
        latents = torch.empty(1, *LATENTS, requires_grad=True)
        with LiveBytes() as memory:
            images = decoder(latents)
            assert memory.live / 2**20 == pytest.approx(kept, abs=1)
            del images
            decoder.reward_gradient(latents, [""], total)
    assert memory.peak / 2**20 == pytest.approx(peak, abs=1)
    if how != "kernel":
        planned = decode_bytes(stable_diffusion, LATENTS, torch.bfloat16, checkpoint)
        assert memory.peak == pytest.approx(planned, rel=1e-3)


def test_decode_bytes(stable_diffusion):
    """In proportion to the image and to the type, but for the float32 image; the autoencoder is left as it was."""
    single = decode_bytes(stable_diffusion, LATENTS, torch.float32)
    assert 1.98 < single / decode_bytes(stable_diffusion, LATENTS, torch.bfloat16) <= 2
    assert decode_bytes(stable_diffusion, (4, 128, 128), torch.float32) / single == pytest.approx(4, rel=0.01)
    assert (stable_diffusion.device.type, stable_diffusion.dtype) == ("meta", torch.float32)
    assert decode_bytes(AutoencoderTiny(), LATENTS, torch.float32) < single / 3


def flops(images: Callable[[Tensor], Tensor]) -> int:
    """Of `images`, a function of latents, and its backward pass."""
    latents = torch.empty(1, *LATENTS, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(images(1 * latents).sum(), latents)  # the counter takes no leaves as a module's input
    return counter.get_total_flops()


def test_arithmetic(stable_diffusion):
    """None is added by keeping less; checkpointing adds a fifth; the tiny autoencoder takes a seventeenth."""
    with FakeTensorMode():
        vae, tiny = (with_empty_weights(network, torch.float32) for network in (stable_diffusion, AutoencoderTiny()))
        kept = flops(Decoder(vae))
        assert kept == flops(lambda latents: vae.decode(latents).sample)
        assert flops(Decoder(vae, checkpoint=True)) / kept == pytest.approx(1.2, abs=0.02)
        assert kept / flops(Decoder(tiny)) == pytest.approx(17, abs=1)


MEASURED_LATENTS = (4, 32, 32)


def mid_size() -> AutoencoderKL:
    """32 × 32 latents to 128 × 128 images."""
    return build_vae(64, 128, 128, layers=1, groups=8)


def resident_bytes(run: Callable[[Tensor], object]) -> int:
    """How far `run` lifts the peak of the resident set, in a child process that has run it with small latents."""
    from resource import RUSAGE_SELF, getrusage

    read, write = os.pipe()
    if os.fork() == 0:
        run(torch.randn(1, 4, 8, 8))
        before = getrusage(RUSAGE_SELF).ru_maxrss
        run(torch.randn(1, *MEASURED_LATENTS))
        os.write(write, str(1024 * (getrusage(RUSAGE_SELF).ru_maxrss - before)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        os.wait()
        return int(pipe.read())


def measure() -> dict[str, int]:
    """By how decoding is done, in a process that has not computed anything, so that it can fork."""
    torch.set_num_threads(1)
    vae = mid_size()
    return {
        "plain": resident_bytes(lambda latents: plain_gradient(vae, latents)),
        "kept": resident_bytes(lambda latents: Decoder(vae).reward_gradient(latents, [""], total)),
        "checkpoint": resident_bytes(
            lambda latents: Decoder(vae, checkpoint=True).reward_gradient(latents, [""], total)
        ),
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux only")
def test_resident_set():
    """Measured: 127 MiB plain, 55 kept and 45 checkpointed; 1.02 and 1.05 times what is predicted for these two. Of the larger
    images in docs/performance.md: 289, 123 and 99 MiB; 1.01 and 1.02 times."""
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-c",
        "import json, tests.models.test_decoder_memory as m; print(json.dumps(m.measure()))",
    ]
    # glibc then returns every tensor's memory to the system as it is freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout
    measured = json.loads(output.splitlines()[-1])
    assert measured["kept"] < 0.65 * measured["plain"]
    assert measured["checkpoint"] < 0.93 * measured["kept"]
    for name, checkpoint in (("kept", False), ("checkpoint", True)):
        predicted = decode_bytes(mid_size(), MEASURED_LATENTS, torch.float32, checkpoint)
        assert 0.95 < measured[name] / predicted < 1.4, f"{name}: {measured[name]} of {predicted} bytes"
