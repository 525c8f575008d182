"""A step of the sampler by its Triton kernel: against plain torch with given noise, against NumPy with its own."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from fastnabla.kernels.guided_step import guided_step
from fastnabla.objective.ops import PLAIN
from tests.checks import relative_error
from tests.kernels.test_gaussian_log_prob import (
    DTYPES,
    LAYOUTS,
    ODD,
    STEPS,
    TABLE,
    channels_last,
    on_cases,
    on_devices,
    on_guidance,
    on_layouts,
    poison_new_memory,
)
from tests.kernels.test_gaussian_log_prob import batch as transitions

NOISE_ALONE = torch.zeros(10, 8)  # x' = 0 x + 0 o + 1 ε
NOISE_ALONE[:, 2] = 1


def batch(
    layout: tuple, device: str, dtypes: tuple = DTYPES["fp32"], guidance: float | None = 5.0, steps: tuple = STEPS
) -> dict[str, Tensor]:
    """Arguments of a call with given noise, for which any numbers will do."""
    (output, x, noise), step_index = transitions(layout, guidance, device, dtypes, steps)
    sampler = {"table": TABLE.packed(x.device), "step_index": step_index, "guidance_scale": guidance}
    return {"output": output, "x": x, "noise": noise, **sampler}


def seeded(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The call with noise of the kernel's own."""
    return {**held, "noise": None, "seeds": torch.arange(len(held["x"]), device=held["x"].device) - 1}


def draw(seeds: list[int], steps: list[int], shape: tuple[int, ...], device: str) -> Tensor:
    """The kernel's noise alone."""
    x = torch.zeros(len(seeds), *shape, device=device)
    seeds, steps = torch.tensor(seeds, device=device), torch.tensor(steps, device=device)
    return guided_step(x, x, NOISE_ALONE.to(device), steps, seeds=seeds, guidance_scale=None)[0]


def philox(counter: list, key: list) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al., SC 2011) on 32-bit words, in uint64."""
    c, k = ([np.asarray(word, np.uint64) for word in words] for words in (counter, key))
    half, low = np.uint64(32), np.uint64(2**32 - 1)
    for _ in range(10):
        even, odd = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [odd >> half ^ c[1] ^ k[0], odd & low, even >> half ^ c[3] ^ k[1], even & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


def normals(seed: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of one row: uniform numbers in float32 as Triton makes them, Box–Muller pairs of them in float64."""
    channels = shape[0] if len(shape) > 1 else 1
    positions = np.arange(np.prod(shape) // channels)
    quads = np.arange(-(-channels // 4))[:, None]
    seed %= 2**64
    words = philox([positions + 0 * quads, quads + 0 * positions, step, 0], [seed % 2**32, seed // 2**32])
    signed = np.stack(words, 1).astype(np.uint32).view(np.int32)  # [quads, 4, positions]
    uniform = np.where(signed < 0, -(signed + 1), signed).astype(np.float32) * np.float32(4.6566127342e-10)
    u, v = uniform[:, 0::2].astype(float), uniform[:, 1::2].astype(float)
    radius, angle = np.sqrt(-2 * np.log(np.maximum(u, 1e-7))), 2 * np.pi * v
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 2)
    return pairs.reshape(-1, len(positions))[:channels].reshape(shape)


@on_devices
@on_guidance
@on_cases
def test_accuracy(layout, dtypes, guidance, device):
    """The error of each row is at most twice that of plain torch on the same inputs."""
    held = batch(layout, device, dtypes, guidance)
    inputs = [held[name] for name in ("output", "x", "noise")]
    x_next, o, _ = guided_step(**held)
    assert (x_next.dtype, x_next.stride()) == (held["x"].dtype, held["x"].stride())
    assert (o.dtype, o.stride()) == (torch.float32, held["x"].stride())
    plain, exact = (
        PLAIN.guided_step(*tensors, TABLE.rows(held["step_index"], tensors[1]), guidance_scale=guidance)
        for tensors in (inputs, [tensor.double() for tensor in inputs])
    )
    for ours, theirs, truth in zip((x_next, o), plain, exact, strict=True):
        for i in range(len(truth)):
            assert relative_error(ours[i], truth[i]) <= 2 * relative_error(theirs[i], truth[i])


def test_philox_known_answers():
    """Of `kat_vectors` of Random123, where counter and key are all zeros and all ones."""
    zeros, ones = "6627e8d5 e169c58d bc57ac4c 9b00dbd8", "408f276d 41c83b0e a20bc7c6 6d5451fd"
    for word, expected in ((0, zeros), (2**32 - 1, ones)):
        assert " ".join(f"{value:08x}" for value in philox([word] * 4, [word] * 2)) == expected


@on_devices
@pytest.mark.parametrize("shape", [(77,), (1, 9), (5, 7, 9), (4, 30, 20), (6, 2, 5, 7)], ids=str)
def test_noise_is_that_of_philox(shape, device):
    """The angle, up to 2π in float32, is off by up to 5e-7, the radius is up to 5.7. Measured: 1.4e-6 in the interpreter."""
    seeds, steps = [0, -1, 2**63 - 1, 0x123456789ABCDEF], [0, 3, 9, 9]
    expected = np.stack([normals(seed, step, shape) for seed, step in zip(seeds, steps, strict=True)])
    np.testing.assert_allclose(draw(seeds, steps, shape, device).cpu().numpy(), expected, rtol=0, atol=1e-5)


@on_devices
@on_guidance
def test_same_bits_for_any_batch(guidance, device):
    """Two rows in the other order as in the whole batch."""
    held = seeded(batch(ODD, device, guidance=guidance))
    some = torch.tensor([2, 0], device=device)
    of_output = some if guidance is None else torch.cat([some, len(held["x"]) + some])
    picked = {**held, "output": channels_last(held["output"][of_output])}
    picked |= {name: held[name][some] for name in ("x", "step_index", "seeds")}
    results = (guided_step(**arguments, with_log_prob=True) for arguments in (held, picked))
    for whole, part in zip(*results, strict=True):
        assert torch.equal(whole[some], part)


@on_devices
@pytest.mark.parametrize("last", [("output",), ("x",), ("output", "x")], ids=str)
def test_same_noise_for_any_layout(last, device):
    held = seeded(batch(LAYOUTS["contiguous"], device)) | {"table": NOISE_ALONE.to(device)}
    other = {**held, **{name: channels_last(held[name]) for name in last}}
    assert torch.equal(guided_step(**held)[0], guided_step(**other)[0])


@on_devices
def test_noise_differs_by_seed_and_step(device):
    """Seeds that differ in their high or low halves alone, and steps: no number occurs again at its place."""
    seeds, steps = [5, 6, 5 + 2**32, -5, 5], [0, 0, 0, 0, 1]
    rows = draw(seeds, steps, (5, 10, 10), device)
    assert all((rows[i] != rows[j]).all() for i in range(5) for j in range(i))


@on_devices
def test_noise_is_normal(device):
    """51200 numbers of two seeds and two steps: moments and correlations to 4 standard errors of independent normals.

    Seeds are fixed. The channels of a pair share their radius, those of a quad their Philox block.
    """
    rows = draw([1, 1, 2, 2], [0, 1, 0, 1], (8, 40, 40), device).cpu().numpy().astype(float)
    skewness, kurtosis = scipy.stats.skew(rows, None), scipy.stats.kurtosis(rows, None)
    for moment, variance in ((rows.mean(), 1), (rows.var() - 1, 2), (skewness, 6), (kurtosis, 24)):
        assert abs(moment) < 4 * (variance / rows.size) ** 0.5
    assert scipy.stats.kstest(rows.ravel(), "norm").pvalue > 1e-3
    lines = rows.reshape(4, 8, -1)
    for one, other in (
        (lines[:, :-1], lines[:, 1:]),  # channels
        (lines[:, :-4], lines[:, 4:]),  # quads
        (lines[..., :-1], lines[..., 1:]),  # positions
        (lines[::2], lines[1::2]),  # steps
        (lines[:2], lines[2:]),  # seeds
    ):
        for power in (1, 2):
            correlation = np.corrcoef(one.ravel() ** power, other.ravel() ** power)[0, 1]
            assert abs(correlation) < 4 / one.size**0.5


@on_devices
@on_cases
def test_log_density_is_that_of_the_rounded_state(layout, dtypes, device):
    """To twice the error of plain torch, plus 8 roundings of float32, for plain torch may be right by luck."""
    held = batch(layout, device, dtypes)
    output, x = held["output"], held["x"]
    x_next, _, log_prob = guided_step(**seeded(held), with_log_prob=True)
    exact, plain = (
        PLAIN.gaussian_log_prob(*tensors, TABLE.rows(held["step_index"], tensors[1]), guidance_scale=5.0)
        for tensors in ([t.double() for t in (output, x, x_next)], (output, x, x_next))
    )
    for i in range(len(x)):
        assert relative_error(log_prob[i], exact[i]) <= 2 * relative_error(plain[i], exact[i]) + 2**-21


@on_devices
@on_layouts
def test_everything_is_written(layout, device, monkeypatch):
    """Memory that is allocated without values is NaN the second time."""
    held = seeded(batch(layout, device))
    expected = guided_step(**held, with_log_prob=True)
    poison_new_memory(monkeypatch)
    for one, two in zip(guided_step(**held, with_log_prob=True), expected, strict=True):
        assert torch.equal(one, two)


@on_devices
@on_layouts
def test_slabs(layout, device):
    """Rows that a slab does not have are not stored, the others are as returned, in its dtype; no other is touched."""
    held = batch(layout, device, DTYPES["all_differ"])
    slabs, expected = {}, []
    for name, rows, length, dtype in (
        ("state", [2, -1, 0], 4, torch.float16),
        ("output", [5, 1, 6], 6, torch.bfloat16),
    ):
        expected.append(torch.full((length, *layout[0]), 7.0, dtype=dtype, device=device))
        slabs |= {f"{name}_slab": expected[-1].clone(), f"{name}_rows": torch.tensor(rows, device=device)}
    x_next, o, _ = guided_step(**held, **slabs)
    expected[0][[2, 0]], expected[1][[5, 1]] = x_next[[0, 2]].to(torch.float16), o[[0, 1]].to(torch.bfloat16)
    assert torch.equal(slabs["state_slab"], expected[0])
    assert torch.equal(slabs["output_slab"], expected[1])


@on_devices
def test_no_gradient(device):
    held = batch(ODD, device)
    held["output"].requires_grad_(), held["x"].requires_grad_()
    assert not any(result.requires_grad for result in guided_step(**held, with_log_prob=True))


@on_devices
def test_zero_rows(device):
    held = batch(ODD, device, DTYPES["bf16"], steps=())
    for arguments in (held, seeded(held)):
        x_next, o, log_prob = guided_step(**arguments, with_log_prob=True)
        assert (x_next.shape, o.shape, log_prob.shape) == ((0, *ODD[0]), (0, *ODD[0]), (0,))


SLAB = torch.zeros(2, *ODD[0])
SEEDS = torch.arange(3)
WRONG = {
    "both": ({"seeds": SEEDS}, "noise and seeds: expected one of them"),
    "neither": ({"noise": None}, "noise and seeds: expected one of them"),
    "seeds_shape": (
        {"noise": None, "seeds": SEEDS[:2]},
        r"seeds is torch.int64 \(2,\) .*, expected torch.int64 \(3,\)",
    ),
    "seeds_dtype": ({"noise": None, "seeds": SEEDS.int()}, r"seeds is torch.int32 \(3,\)"),
    "seeds_strides": ({"noise": None, "seeds": SEEDS.repeat(2)[::2]}, r"seeds has strides \(2,\), expected contiguous"),
    "slab_alone": ({"state_slab": SLAB}, "state_slab and state_rows: expected both or neither"),
    "rows_alone": ({"output_rows": SEEDS}, "output_slab and output_rows: expected both or neither"),
    "rows_shape": ({"state_slab": SLAB, "state_rows": SEEDS[:2]}, r"state_rows is torch.int64 \(2,\)"),
    "rows_dtype": ({"output_slab": SLAB, "output_rows": SEEDS.int()}, r"output_rows is torch.int32 \(3,\)"),
    "slab_shape": ({"state_slab": SLAB[:, :4], "state_rows": SEEDS}, r"state_slab is \(2, 4, 7, 9\) .* expected cont"),
    "slab_strides": ({"output_slab": channels_last(SLAB), "output_rows": SEEDS}, "output_slab is .* expected cont"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        guided_step(**{**batch(ODD, "cpu"), **changes})
