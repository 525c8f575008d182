"""A channels-last decoder: every convolution computes in it, and nothing is copied on the way."""

import copy
import functools

import pytest
import torch
from diffusers import AutoencoderTiny
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastnabla.kernels.group_norm_silu import group_norm_silu_backward_op, group_norm_silu_op
from fastnabla.models.decoder import Decoder, with_empty_weights
from tests.checks import BACKENDS, randn, relative_error
from tests.models.test_decoder import PROMPTS, build_vae, reward
from tests.models.test_decoder_memory import LATENTS, sd15_vae, total

aten = torch.ops.aten


def layout_of(tensor: Tensor) -> str:
    nchw, last = tensor.is_contiguous(), tensor.is_contiguous(memory_format=torch.channels_last)
    return "either" if nchw and last else "NCHW" if nchw else "channels-last" if last else "neither"


def activations(arguments: tuple, result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Of a convolution, forward or backward: what comes in, and what goes out."""
    return [arguments[0], result if isinstance(result, Tensor) else result[0]]


class Layouts(TorchDispatchMode):
    """`layouts` of convolutions' activations; bytes `transposed` around those not in channels-last, if each is read and
    written once more, as cuDNN has to in bfloat16; bytes `copied` from one layout to another; and by the kernel, bytes
    `normalised`, and the gradients of shortcuts, in bytes `skipped`, that it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts, self.transposed, self.copied, self.normalised, self.skipped = set(), 0, 0, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation in (aten.convolution.default, aten.convolution_backward.default):
            for tensor in activations(args, result):
                # An AutoencoderTiny's own last convolution is given the gradient of the image as it comes.
                if operation == aten.convolution.default or tensor.shape[1] > 3:
                    self.layouts.add(layout_of(tensor))
                    self.transposed += 2 * tensor.nbytes * (layout_of(tensor) == "NCHW")
        elif operation in (aten.clone.default, aten._to_copy.default, aten.copy_.default):
            source = args[1] if operation == aten.copy_.default else args[0]
            if result.dim() == 4 and layout_of(result) != layout_of(source):
                self.copied += source.nbytes + result.nbytes
        elif operation == group_norm_silu_op:
            self.normalised += args[0].nbytes
        elif operation == group_norm_silu_backward_op:
            self.skipped += 0 if args[7] is None else args[7].nbytes
        return result


@pytest.fixture(scope="module")
def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))


@pytest.mark.parametrize("which", ["kept", "checkpoint", "tiny"])
def test_every_convolution_is_channels_last(which: str, tiny: AutoencoderTiny) -> None:
    vae = copy.deepcopy(tiny) if which == "tiny" else build_vae()
    decoder, latents = Decoder(vae, 3, which == "checkpoint", channels_last=True), randn(4, 4, 8, 8)
    with Layouts() as seen:
        _, gradient = decoder.reward_gradient(latents, PROMPTS, reward)
        images = decoder.decode(latents)
    assert seen.layouts == {"channels-last"}
    assert images.is_contiguous()
    assert gradient.is_contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_convolution_is_channels_last_when_compiled(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the layouts in the graphs that a compiler is given: forward, and backward. With the kernel, nothing is copied around
    its nine calls in each, and the gradient is that of plain torch."""
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=aot_autograd(fw_compiler=record)))
    torch._dynamo.reset()
    one_block = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae, latents = build_vae(block_out_channels=(16,), norm_num_groups=2, **one_block), randn(1, 4, 3, 5)
    decoder = Decoder(vae, compile=True, channels_last=True, backend=backend)
    _, gradient = decoder.reward_gradient(latents, PROMPTS[:1], reward)
    assert len(graphs) == 2
    for graph in graphs:
        convolutions = [node for node in graph.graph.nodes if node.target == aten.convolution.default]
        assert len(convolutions) == 11
        for node in convolutions:
            tensors = activations((node.args[0].meta["val"],), node.meta["val"])
            assert {layout_of(tensor) for tensor in tensors} == {"channels-last"}
        copied = [node.args[0] for node in graph.graph.nodes if node.target == aten.clone.default]
        assert backend == "torch" or not set(copied) & set(convolutions)
    if backend == "triton":
        for graph, operation in zip(graphs, (group_norm_silu_op, group_norm_silu_backward_op), strict=True):
            assert sum(operation in (node.target, *node.args) for node in graph.graph.nodes) == 9
        _, plain = Decoder(vae, channels_last=True, backend="torch").reward_gradient(latents, PROMPTS[:1], reward)
        assert relative_error(gradient, plain) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "kept"])
def test_bytes_at_the_size_of_stable_diffusion(checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image at 512² in bfloat16, decoded with its gradient: 9.6 GB are transposed in NCHW (11.0 checkpointed), none
    in channels-last, where 7 MB are copied: latents, image, and the image's gradient. The kernel normalises 0.91 GB
    (1.29 checkpointed), and adds the gradients of 0.47 GB of shortcuts."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the kernel can be chosen; nothing is computed
    seen = {}
    with FakeTensorMode():
        for channels_last in (False, True):
            vae = with_empty_weights(sd15_vae(), torch.bfloat16)
            backend = "triton" if channels_last else "torch"
            decoder = Decoder(vae, checkpoint=checkpoint, channels_last=channels_last, backend=backend)
            with Layouts() as seen[channels_last]:
                decoder.reward_gradient(torch.empty(1, *LATENTS), [""], total)
    assert seen[False].transposed == pytest.approx(11.03e9 if checkpoint else 9.62e9, rel=1e-3)
    assert seen[True].transposed == 0
    assert seen[True].copied < 7e6
    assert seen[True].normalised == pytest.approx(1.29e9 if checkpoint else 0.914e9, rel=1e-2)
    assert seen[True].skipped == pytest.approx(0.474e9, rel=1e-3)


def test_one_decoder_leaves_another_of_the_same_autoencoder_right() -> None:
    """The weights are in the layout of the decoder made last; the other still decodes the same."""
    vae, latents = build_vae(), randn(2, 4, 8, 8)
    contiguous = Decoder(vae)
    expected = contiguous.reward_gradient(latents, PROMPTS[:2], reward)
    assert layout_of(vae.decoder.conv_in.weight) == "NCHW"
    last = Decoder(vae, channels_last=True)
    weights = [module.weight for module in vae.decoder.modules() if isinstance(module, nn.Conv2d)]
    assert {layout_of(weight) for weight in weights} == {"channels-last", "either"}, "either: of 1 × 1"
    for decoder in (contiguous, last):
        for actual, tensor in zip(decoder.reward_gradient(latents, PROMPTS[:2], reward), expected, strict=True):
            torch.testing.assert_close(actual, tensor, rtol=1e-4, atol=1e-6 * tensor.abs().max().item())
