"""A step of the sampler by its Triton kernel, against plain torch."""

import pytest
import torch
from torch import Tensor

from fastnabla.kernels.guided_step import guided_step
from fastnabla.objective.ops import PLAIN
from tests.checks import relative_error
from tests.kernel_cases import in_channels_last, on_each_device, poisoned_memory
from tests.kernels.test_gaussian_log_prob import (
    DTYPES,
    LAYOUTS,
    ODD,
    STEPS,
    TABLE,
    on_cases,
    on_guidance,
    on_layouts,
)
from tests.kernels.test_gaussian_log_prob import batch as transitions


def batch(
    layout: tuple, device: str, dtypes: tuple = DTYPES["fp32"], guidance: float | None = 5.0, steps: tuple = STEPS
) -> dict[str, Tensor]:
    """Arguments of a call, for which any numbers will do."""
    (output, x, noise), step_index = transitions(layout, guidance, device, dtypes, steps)
    sampler = {"table": TABLE.packed(x.device), "step_index": step_index, "guidance_scale": guidance}
    return {"output": output, "x": x, "noise": noise, **sampler}


@on_each_device
@on_guidance
@on_cases
def test_accuracy(layout, dtypes, guidance, device):
    """The error of each row is at most twice that of plain torch on the same inputs."""
    held = batch(layout, device, dtypes, guidance)
    inputs = [held[name] for name in ("output", "x", "noise")]
    x_next, o = guided_step(**held)
    assert (x_next.dtype, x_next.stride()) == (held["x"].dtype, held["x"].stride())
    assert (o.dtype, o.stride()) == (torch.float32, held["x"].stride())
    plain, exact = (
        PLAIN.guided_step(*tensors, TABLE.rows(held["step_index"], tensors[1]), guidance_scale=guidance)
        for tensors in (inputs, [tensor.double() for tensor in inputs])
    )
    for ours, theirs, truth in zip((x_next, o), plain, exact, strict=True):
        for i in range(len(truth)):
            assert relative_error(ours[i], truth[i]) <= 2 * relative_error(theirs[i], truth[i])


@on_each_device
@on_guidance
def test_same_bits_for_any_batch(guidance, device):
    """Two rows in the other order as in the whole batch."""
    held = batch(ODD, device, guidance=guidance)
    some = torch.tensor([2, 0], device=device)
    of_output = some if guidance is None else torch.cat([some, len(held["x"]) + some])
    picked = {**held, "output": in_channels_last(held["output"][of_output])}
    picked |= {name: held[name][some] for name in ("x", "noise", "step_index")}
    for whole, part in zip(guided_step(**held), guided_step(**picked), strict=True):
        assert torch.equal(whole[some], part)


@on_each_device
@pytest.mark.parametrize("last", [("output",), ("x",), ("noise",), ("output", "x", "noise")], ids=str)
def test_same_bits_for_any_layout(last, device):
    held = batch(LAYOUTS["contiguous"], device)
    other = {**held, **{name: in_channels_last(held[name]) for name in last}}
    for one, two in zip(guided_step(**held), guided_step(**other), strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
@on_each_device
@on_layouts
def test_everything_is_written(layout, device):
    """Memory that is allocated without values is NaN the second time."""
    held = batch(layout, device)
    expected = guided_step(**held)
    with poisoned_memory():
        again = guided_step(**held)
    for one, two in zip(again, expected, strict=True):
        assert torch.equal(one, two)


@on_each_device
def test_no_gradient(device):
    held = batch(ODD, device)
    held["output"].requires_grad_(), held["x"].requires_grad_()
    assert not any(result.requires_grad for result in guided_step(**held))


@on_each_device
def test_zero_rows(device):
    x_next, o = guided_step(**batch(ODD, device, DTYPES["bf16"], steps=()))
    assert (x_next.shape, o.shape) == ((0, *ODD[0]), (0, *ODD[0]))


NOISE = torch.zeros(3, *ODD[0])
WRONG = {
    "noise_shape": (NOISE[:2], r"noise has shape \(2, .*\), expected \(3, "),
    "noise_dtype": (NOISE.double(), "noise has dtype torch.float64"),
    "noise_strides": (NOISE.repeat(2, 1, 1, 1)[::2], r"noise .* expected contiguous or channels-last"),
}


@pytest.mark.parametrize(("noise", "message"), WRONG.values(), ids=WRONG)
def test_wrong_noise(noise, message):
    with pytest.raises(ValueError, match=message):
        guided_step(**{**batch(ODD, "cpu"), "noise": noise})
