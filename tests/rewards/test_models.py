"""Network rewards: precision, checkpointing, prompts and shapes, on tiny models and on the real ones on the meta device."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnabla.rewards import PUBLISHED, precision, published_class
from fastnabla.rewards.inspection import SavedBytes
from fastnabla.rewards.model import RewardModel
from fastnabla.rewards.options import DEFAULTS, RewardOptions
from fastnabla.rewards.precision import computing_in, precision_on, score_in
from fastnabla.rewards.preprocess import bicubic_by_matrices, crop_short_side, pad_long_side, squash
from fastnabla.rewards.text import PromptCache, hash_tokenizer
from tests.checks import relative_error
from tests.golden_rewards import SETS, TINY, golden, gradient

META = torch.device("meta")
IMAGES = torch.rand(3, 3, 50, 64, generator=torch.Generator().manual_seed(0))


class Matrix(RewardModel):
    """A single layer that records the precision of its forward and backward pass, and how prompts are encoded."""

    def __init__(self, options: RewardOptions = DEFAULTS, fail: bool = False) -> None:
        super().__init__(nn.Identity(), options, layer=nn.Linear(4, 1))
        self.fail, self.seen = fail, []

    def note(self, *_: Tensor) -> None:
        self.seen.append((set(precisions()), torch.is_autocast_enabled("cpu")))

    def encode_prompt(self, prompt: str) -> Tensor:
        self.note()
        return torch.zeros(1)

    def score(self, pixel_values: Tensor, prompts: list[str]) -> Tensor:
        self.note()
        pixel_values = pixel_values * 1
        if pixel_values.requires_grad:
            pixel_values.register_hook(self.note)
        if self.fail:
            raise ZeroDivisionError
        return self.layer(pixel_values.mean((1, 2)))[:, 0]


def precisions() -> list[str]:
    backends = torch.backends
    cudnn, mkldnn = (getattr(backends, name) for name in ("cudnn", "mkldnn"))
    kinds = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    return [switch.fp32_precision for switch in (backends, cudnn, mkldnn, *kinds)]


def older() -> tuple[str, bool, bool]:
    """The older switches, which torch refuses to read if they differ from the newer ones."""
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )


@pytest.mark.parametrize("name", TINY)
def test_frozen_and_in_eval_mode(name: str) -> None:
    reward = TINY[name]()
    reward.train()
    assert not any(module.training for module in reward.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize("name", SETS)
def test_float32_whatever_the_policy_runs_in(name: str) -> None:
    prompts = ["0", "1", "2"]
    expected, expected_gradient = gradient(TINY[name](), IMAGES, prompts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, image_grad = gradient(TINY[name](), IMAGES, prompts)
    assert torch.equal(values, expected) and torch.equal(image_grad, expected_gradient)
    half = TINY[name]()(IMAGES.bfloat16(), prompts)
    assert half.dtype == torch.float32
    assert torch.equal(half, TINY[name]()(IMAGES.bfloat16().float(), prompts))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_precision_holds_in_both_passes_and_is_put_back(precision: str) -> None:
    reward = Matrix(RewardOptions(precision=precision))
    images = torch.rand(2, 3, 5, 4, requires_grad=True)
    before = precisions(), older()
    values = reward(images, ["", ""])
    assert (precisions(), older()) == before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values.sum().backward()
    assert (precisions(), older()) == before
    assert reward.seen == [({"ieee"}, precision == "bf16"), ({"ieee"}, False)]
    with torch.no_grad():
        reward(images, ["", ""])
    assert len(reward.seen) == 3 and (precisions(), older()) == before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reward.prompt_cache("")
    assert reward.seen[-1] == ({"ieee"}, False)


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Restore the switches to their state at the start of a process."""
    try:
        yield
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("around", ["default", "older high", "older cudnn off", "newer matmul", "everything"])
def test_all_switches_agree_and_are_put_back(precision: str, around: str) -> None:
    """Also after a failure. Inside, torch can read the older switches, as torch.compile does, however they were set."""
    with as_before():
        if around == "older high":
            torch.set_float32_matmul_precision("high")
        elif around == "older cudnn off":
            torch.backends.cudnn.allow_tf32 = False
        elif around == "newer matmul":
            torch.backends.cuda.matmul.fp32_precision = "tf32"  # from now on the older ones cannot be read
        elif around == "everything":
            torch.backends.fp32_precision = "tf32"
        before = precisions()
        with pytest.raises(ZeroDivisionError), computing_in(precision, torch.device("cpu")):
            tf32 = precision == "tf32"
            assert older() == (("high", True, True) if tf32 else ("highest", False, False))
            assert set(precisions()) == {"tf32" if tf32 else "ieee"}
            raise ZeroDivisionError
        assert precisions() == before
        if around == "everything":  # and not what was read of the wider one
            torch.backends.fp32_precision = "ieee"
            assert torch.backends.mkldnn.conv.fp32_precision == "ieee"
        elif around != "newer matmul":
            high = around == "older high"
            assert older() == ("high" if high else "highest", high, around != "older cudnn off")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_compiled_reward_runs_in_tf32(backend: str) -> None:
    """Forward and backward, whether it is compiled inside the context or before. The CPU has no TF32, so the numbers are the
    same up to rounding. Deduplication makes dynamo read the older switches on a CPU, as inductor's
    choice of kernels does on a GPU."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(48, 3, bias=False)
    if backend == "aot_eager":  # of which inductor would generate C++, and wait for its compiler
        layers = nn.Conv2d(3, 2, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8, 1), nn.Flatten(0)
    network = nn.Sequential(*layers).requires_grad_(False)
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    for first_within in (True, False):
        compiled, results = torch.compile(network, fullgraph=True, backend=backend), []
        for function, within in ((network, True), (compiled, first_within), (compiled, True)):
            with torch._dynamo.config.patch(use_graph_deduplication=backend == "aot_eager"):
                values = score_in("tf32", function, images) if within else function(images)
                results.append((values.detach(), torch.autograd.grad(values.sum(), images)[0]))
        for found in results[1:]:
            assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, results[0], strict=True))
        assert results[0][1].any()


def test_default_precision(caplog: pytest.LogCaptureFixture) -> None:
    """Without TF32 the rewards use float32, with one warning."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    wanted = [None, "float32", "tf32", "bf16"]
    assert [precision_on(gpu, precision) for precision in wanted] == ["tf32", "float32", "tf32", "bf16"]
    precision._log_no_tf32.cache_clear()
    assert [precision_on(cpu, precision) for precision in wanted * 2] == ["float32", "float32", "float32", "bf16"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "reward.precision = 'tf32': cpu has no TF32; the rewards compute in float32."
    ]
    with pytest.raises(
        ValueError, match=r"reward\.precision = 'fp16': must be one of 'float32', 'tf32', 'bf16', or None"
    ):
        RewardOptions(precision="fp16")


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_is_autocast_of_the_image_networks(name: str) -> None:
    """The halved layers give the numbers of autocast with float32 weights, bit for bit. Scores and gradients differ from
    float32 by a few roundings of 2⁻⁹. The prompt's embedding is that of float32."""
    prompts = ["0", "1", "2"]
    exact, halved = TINY[name](), TINY[name](RewardOptions(precision="bf16"))
    values, image_grad = gradient(halved, IMAGES, prompts)
    assert values.dtype == image_grad.dtype == torch.float32
    autocast = TINY[name]()
    autocast.precision = "bf16"
    assert all(
        torch.equal(*pair) for pair in zip(gradient(autocast, IMAGES, prompts), (values, image_grad), strict=True)
    )
    wanted, wanted_grad = gradient(exact, IMAGES, prompts)
    assert 0 < relative_error(values, wanted) < 2e-2
    assert 0 < relative_error(image_grad, wanted_grad) < 5e-2
    assert storage(halved) < storage(exact)
    if halved.prompt_cache.results:
        assert torch.equal(halved.prompt_cache("0"), exact.prompt_cache("0"))
    checkpointed = TINY[name](RewardOptions(precision="bf16", checkpoint=True))
    again, again_grad = gradient(checkpointed, IMAGES, prompts)
    assert torch.equal(again, values) and relative_error(again_grad, image_grad) < 1e-6


def storage(reward: RewardModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in reward.parameters())


def test_one_backward_pass_a_call() -> None:
    images = torch.rand(2, 3, 5, 4, requires_grad=True)
    values = Matrix()(images, ["", ""])
    values.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per call"):
        values.sum().backward()
    (first,) = torch.autograd.grad(Matrix()(images, ["", ""]).sum(), images, create_graph=True)
    assert not first.requires_grad or first.grad_fn is not None
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), images)


@pytest.mark.parametrize("name", SETS)
def test_checkpointing_keeps_gradients_and_saves_memory(name: str) -> None:
    prompts, results, saved = ["0", "1", "2"], [], []
    for checkpoint in (False, True):
        reward = TINY[name](RewardOptions(checkpoint=checkpoint))
        counter = SavedBytes(list(reward.parameters()))
        with counter.counting():
            results.append(gradient(reward, IMAGES, prompts))
        saved.append(counter.total)
    assert torch.equal(results[0][0], results[1][0])
    assert relative_error(results[1][1], results[0][1]) < 1e-6
    assert saved[1] < 0.55 * saved[0]  # of two layers; the deeper, the less


@pytest.mark.parametrize("name", SETS)
def test_rows_are_independent(name: str) -> None:
    reward = TINY[name]()
    together = reward(IMAGES, ["0", "1", "2"])
    alone = torch.cat([TINY[name]()(IMAGES[i : i + 1], [str(i)]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reward(IMAGES.flip(0), ["2", "1", "0"]).flip(0), together, rtol=1e-5, atol=1e-6)


def test_prompts_matter_where_they_should() -> None:
    for name in SETS:
        reward = TINY[name]()
        moved = (reward(IMAGES, ["1", "2", "0"]) - reward(IMAGES, ["0", "1", "2"])).abs().max()
        assert moved == 0 if name == "aesthetic" else moved > 1e-4, name


def test_shapes_are_checked() -> None:
    for images, prompts in ((IMAGES, ["0"]), (IMAGES[0], ["0"]), (IMAGES[:, :2], ["0", "1", "2"])):
        with pytest.raises(ValueError, match="B prompts, not"):
            TINY["hpsv2"]()(images, prompts)


def test_each_prompt_is_encoded_once_by_itself() -> None:
    reward, asked = TINY["hpsv2"](), []
    encode = reward.prompt_cache.compute
    reward.prompt_cache.compute = lambda prompt: (asked.append(prompt), encode(prompt))[1]
    with torch.inference_mode():
        reward(IMAGES, ["0", "1", "0"])
    values, image_grad = gradient(reward, IMAGES, ["0", "1", "0"])
    assert asked == ["0", "1"] and image_grad.any()
    assert not reward.prompt_cache("0").requires_grad
    reward.double()
    assert torch.allclose(reward(IMAGES, ["0", "1", "0"]), values.double(), atol=1e-6) and asked == ["0", "1"] * 2


def test_what_is_made_in_inference_mode_can_be_trained_with() -> None:
    cache = PromptCache(lambda prompt: torch.ones(1))
    with torch.inference_mode():
        cache("a")
    images = torch.rand(1, requires_grad=True)
    (images * cache("a")).sum().backward()
    assert images.grad == 1


def test_cache_forgets_the_least_recently_used() -> None:
    asked = []
    cache = PromptCache(lambda prompt: (asked.append(prompt), torch.zeros(1))[1], size=2)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        cache(prompt)
    assert asked == ["a", "b", "c", "b"] and len(cache.results) == 2


def test_imagereward_reads_longer_prompts_in_the_reference() -> None:
    for preprocess, expected in (("official", 35), ("reference", 60)):
        reward = published_class("imagereward").random_init(META, RewardOptions(preprocess=preprocess))
        assert len(reward.tokenize("word " * 58)) == expected


def test_a_long_prompt_leaves_its_neighbours_alone() -> None:
    """To the bit. It is read whole, as if it were alone."""
    reward = TINY["imagereward"](RewardOptions(preprocess="reference"))
    reward.tokenize = lambda prompt: [1 + i % 7 for i in range(int(prompt))]
    short, mixed = (gradient(reward, IMAGES, ["6", length, "9"]) for length in ("6", "38"))
    for one, other in zip(short, mixed, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]]) and not torch.equal(one[1], other[1])
    torch.testing.assert_close(reward(IMAGES[1:2], ["38"]), mixed[0][1:2], rtol=1e-5, atol=1e-6)
    assert not torch.equal(reward(IMAGES[1:2], ["37"]), reward(IMAGES[1:2], ["38"]))


def test_hash_tokenizer_is_stable() -> None:
    tokenize = hash_tokenizer(1, 2, 10, 20, 5)
    assert tokenize("A cat, a") == [1, *tokenize("a CAT,")[1:-1], 2]
    assert tokenize("one two three four five") == [1, *tokenize("one two three")[1:-1], 2]
    assert all(10 <= token < 20 for token in tokenize("some other words")[1:-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("aesthetic", 304_894_177),
        ("clipscore", 427_616_513),
        ("hpsv2", 986_109_441),
        ("imagereward", 446_206_689),
        ("pickscore", 986_109_441),
    ],
)
def test_real_architectures(name: str, parameters: int) -> None:
    assert name in PUBLISHED
    state = torch.get_rng_state()
    reward = published_class(name).build(META, RewardOptions(random_init=True))
    assert sum(parameter.numel() for parameter in reward.parameters()) == parameters
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.empty(2, 3, 300, 400, device=META)
    assert reward.score(reward.preprocess(images), ["a cat", "a dog on the moon"]).shape == (2,)


def test_preprocessing_sizes() -> None:
    for resize in (crop_short_side, pad_long_side, squash):
        for height, width in ((64, 64), (48, 64), (100, 64), (31, 17), (21, 200)):
            images = torch.rand(1, 3, height, width, requires_grad=True)
            pixels = resize(images, 32)
            assert pixels.shape == (1, 3, 32, 32), (resize, height, width)
            assert torch.isfinite(torch.autograd.grad(pixels.sum(), images)[0]).all()


@pytest.mark.parametrize("antialias", [True, False])
def test_bicubic_by_matrices(antialias: bool) -> None:
    """Resizing in deterministic runs on a GPU: equal up to rounding in float64, in both passes, enlarging and shrinking."""
    for height, width in ((24, 17), (80, 70), (50, 64)):
        images = IMAGES.double().requires_grad_()
        wanted = F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=antialias)
        made = bicubic_by_matrices(images, height, width, antialias)
        assert relative_error(made, wanted) < 1e-12
        gradients = [torch.autograd.grad(x.square().sum(), images)[0] for x in (made, wanted)]
        assert relative_error(*gradients) < 1e-12


def test_squashing_without_antialias_leaves_most_pixels_out() -> None:
    used = []
    for resize in (crop_short_side, squash):
        images = torch.rand(1, 3, 512, 512, requires_grad=True)
        pixels = resize(images, 64)
        (image_grad,) = torch.autograd.grad((pixels**2).sum(), images)
        used.append((image_grad != 0).float().mean())
    assert used[0] > 0.99 and used[1] < 0.26


def test_golden_prompts_have_several_lengths() -> None:
    """Otherwise padding would not be tested."""
    for name in ("hpsv2", "imagereward", "pickscore"):
        numbers = golden(name)
        assert len({len(numbers.tokenize(prompt)) for prompt in numbers.prompts}) > 1, name
