"""`fastnabla.compat.nabla_gfn` against the reference implementation's functions."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal

from fastnabla.compat.nabla_gfn import get_alpha_prod_t, inference_step, predict_clean
from fastnabla.transition import TransitionTable
from tests.checks import STABLE_DIFFUSION, ddim, randn, relative_error
from tests.golden import TRANSITION_SETS

CASES = {
    f"{path.parent.name}-{case['prediction_type']}-{case['num_inference_steps']}-{case['eta']}": (path, case)
    for path in TRANSITION_SETS
    for case in json.loads(path.read_text())["cases"]
}
DPM = {**STABLE_DIFFUSION, "algorithm_type": "sde-dpmsolver++", "solver_order": 1, "final_sigmas_type": "sigma_min"}
SHAPE = (3, 4, 5, 5)


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def golden(request) -> tuple[DDIMScheduler, dict, dict[str, Tensor]]:
    path, case = request.param
    numbers = load_file(path.parent / "transitions.safetensors")
    scheduler = DDIMScheduler(**json.loads(path.read_text())["scheduler"], prediction_type=case["prediction_type"])
    scheduler.set_timesteps(case["num_inference_steps"])
    prefix = f"{case['case']}."
    return scheduler, case, {n.removeprefix(prefix): v for n, v in numbers.items() if n.startswith(prefix)}


def test_inference_step_agrees_with_the_reference(golden):
    """To 2e-5: the reference's σ² has 1 − ᾱ/ᾱ' in float32, off by 1.3e-5 in the last row."""
    scheduler, case, numbers = golden
    arguments = {"eta": case["eta"], "prev_sample": numbers["x_next"], "strength": case["pretrained_strength"]}
    for rows in (slice(None), torch.tensor([5, 0])):
        held = {name: value[rows] if isinstance(value, Tensor) else value for name, value in arguments.items()}
        output, timestep, x = (numbers[name][rows] for name in ("model_output", "timestep", "x_t"))
        sample, score = inference_step(scheduler, output, timestep, x, **held)
        assert torch.equal(sample, numbers["x_next"][rows])
        assert relative_error(score, numbers["score"][rows]) < 2e-5


def test_predict_clean_agrees_with_the_reference(golden):
    """At timestep 0 too, where sample-prediction returns the output."""
    scheduler, _, numbers = golden
    assert (numbers["timestep_next"] == 0).any()
    for state, timestep, expected in (("x_t", "timestep", "x0_hat"), ("x_next", "timestep_next", "x0_hat_next")):
        clean = predict_clean(scheduler, numbers["model_output"], numbers[state], numbers[timestep])
        assert relative_error(clean, numbers[expected]) < 1e-6


def test_alpha_prod_agrees_with_the_reference(golden):
    scheduler, _, numbers = golden
    for timestep, expected in (("timestep", "alpha_bar"), ("timestep_next", "alpha_bar_next")):
        actual = get_alpha_prod_t(scheduler, numbers[timestep], numbers["x_t"])
        assert actual.shape == numbers["x_t"].shape
        torch.testing.assert_close(actual[:, 0, 0, 0], numbers[expected], rtol=1e-6, atol=0)


def network(x: Tensor) -> Tensor:
    return (x + x.roll(1, -1) ** 2).sin()


SCHEDULERS = {
    "ddim": (ddim(20), 0.7),
    "ddpm": (DDPMScheduler(**STABLE_DIFFUSION, clip_sample=False, steps_offset=1), 1.0),
    "dpm_single": (DPMSolverSinglestepScheduler(**DPM), 1.0),
    "dpm_multi": (DPMSolverMultistepScheduler(**DPM), 1.0),
}


@pytest.fixture(params=SCHEDULERS.values(), ids=list(SCHEDULERS))
def sampler(request):
    scheduler, eta = request.param
    scheduler.set_timesteps(20)
    return scheduler, eta, scheduler.timesteps[torch.tensor([19, 3, 11])]


def columns(scheduler, eta: float, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    table = TransitionTable.from_scheduler(scheduler, eta=eta)
    step = table.step_index(timestep)
    return tuple(column[step, None, None, None] for column in (table.a, table.b, table.sigma))


def test_scores_are_gradients_of_the_log_density(sampler):
    """In float64: both scores, with a given x', which is held constant, and their own gradients."""
    scheduler, eta, timestep = sampler
    a, b, sigma = columns(scheduler, eta, timestep)
    x = randn(*SHAPE, dtype=torch.float64).requires_grad_()
    x_next = (a * x + b + sigma * randn(*SHAPE, seed=1)).detach()
    weight = randn(*SHAPE, seed=2, dtype=torch.float64)

    end = x_next.clone().requires_grad_()
    log_prob = Normal(a * x + b * network(x), sigma).log_prob(end).sum()
    expected = [torch.autograd.grad(log_prob, at, create_graph=True)[0] for at in (end, x)]
    for reverse_grad, score in zip((False, True), expected, strict=True):
        given, actual = inference_step(
            scheduler,
            network(x),
            timestep,
            x,
            eta,
            prev_sample=x_next,
            reverse_grad=reverse_grad,
            allow_2nd=reverse_grad,
            strength=0.5,
        )
        assert given is x_next
        torch.testing.assert_close(actual, 0.5 * score, rtol=1e-9, atol=1e-12)
        one, other = (torch.autograd.grad((weight * s).sum(), x, retain_graph=True)[0] for s in (actual, 0.5 * score))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_reverse_grad_and_the_graph():
    x = randn(*SHAPE).requires_grad_()
    output = network(x)
    arguments = (ddim(20), output, torch.tensor([951, 1, 51]), x)
    _, score = inference_step(*arguments, prev_sample=randn(*SHAPE), reverse_grad=True, retain_graph=True)
    assert not score.requires_grad
    _, again = inference_step(*arguments, prev_sample=randn(*SHAPE), reverse_grad=True)
    assert torch.equal(score, again)
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


@pytest.mark.parametrize("allow_2nd", [False, True])
def test_reverse_grad_without_gradients_enabled(allow_2nd):
    x = randn(*SHAPE).requires_grad_()
    settings = {"prev_sample": randn(*SHAPE), "reverse_grad": True, "retain_graph": True, "allow_2nd": allow_2nd}
    arguments = (ddim(20), network(x), torch.tensor([951, 1, 51]), x)
    _, expected = inference_step(*arguments, **settings)
    with torch.no_grad():
        _, score = inference_step(*arguments, **settings)
    assert torch.equal(score, expected) and score.requires_grad == allow_2nd


def test_samples(sampler):
    """x' drawn with the generator's noise; its score is −ε/σ, x' held constant. To 1e-4: float32 at a small σ."""
    scheduler, eta, timestep = sampler
    a, b, sigma = columns(scheduler, eta, timestep)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    sample, score = inference_step(scheduler, output, timestep, x, eta, generator=generator)
    noise = randn(*SHAPE, seed=2)
    assert relative_error(sample.detach(), a * x + b * output.detach() + sigma * noise) < 1e-6
    assert relative_error(score.detach() * sigma, -noise) < 1e-4
    (gradient,) = torch.autograd.grad(score.sum(), output)
    torch.testing.assert_close(gradient, (b / sigma**2).float().expand(SHAPE), rtol=1e-4, atol=0)
    same, _ = inference_step(scheduler, output, timestep, x, eta, prev_sample=sample.detach())
    assert torch.equal(same, sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(dtype):
    x, output, x_next = (randn(*SHAPE, seed=seed).to(dtype) for seed in range(3))
    sample, score = inference_step(ddim(20), output, 51, x, prev_sample=x_next)
    assert (sample.dtype, score.dtype) == (dtype, torch.float32)
    assert predict_clean(ddim(20), output, x, 51).dtype == dtype


def test_one_timestep_for_all_rows():
    """As an int, a scalar or one element; with the redundant arguments a sampling loop has."""
    scheduler = ddim(20)
    x, output, x_next = (randn(*SHAPE, seed=seed) for seed in range(3))
    arguments = {"prev_sample": x_next, "prev_timestep": scheduler.timesteps[3], "step_index": 2}
    _, expected = inference_step(scheduler, output, scheduler.timesteps[[2, 2, 2]], x, prev_sample=x_next)
    for timestep in (int(scheduler.timesteps[2]), scheduler.timesteps[2], scheduler.timesteps[2:3]):
        _, score = inference_step(scheduler, output, timestep, x, **arguments)
        assert torch.equal(score, expected)
        assert get_alpha_prod_t(scheduler, timestep, x)[0, 0, 0, 0] == scheduler.alphas_cumprod[scheduler.timesteps[2]]


def test_predict_clean_arguments():
    scheduler = ddim(20)
    x, output = randn(*SHAPE).requires_grad_(), randn(*SHAPE, seed=1).requires_grad_()
    alpha = scheduler.alphas_cumprod[51]
    clean = predict_clean(scheduler, output, x, 51, no_jacobian=True, strength=0.5)
    torch.testing.assert_close(clean, (x - 0.5 * (1 - alpha).sqrt() * output) / alpha.sqrt())
    direct, through = torch.autograd.grad(clean.sum(), (x, output), allow_unused=True)
    torch.testing.assert_close(direct, torch.full(SHAPE, alpha.rsqrt().item()))
    assert through is None
    with pytest.raises(ValueError, match=r"strength = 0\.5: expected 1 with prediction_type='v_prediction'"):
        predict_clean(ddim(20, prediction_type="v_prediction"), output, x, 51, strength=0.5)


X = randn(*SHAPE)
WRONG = {
    "both": ({"prev_sample": X, "generator": torch.Generator()}, "generator and prev_sample are both given"),
    "retain_graph": ({"retain_graph": True}, "have no effect without reverse_grad"),
    "allow_2nd": ({"allow_2nd": True}, "have no effect without reverse_grad"),
    "reverse_grad": ({"reverse_grad": True}, "sample must require a gradient"),
    "without_graph": (
        {"reverse_grad": True, "sample": X.clone().requires_grad_()},
        "model_output has no graph: compute",
    ),
    "timestep": ({"timestep": 52}, "timestep 52 is not one of the sampler's 20"),
    "timesteps": (
        {"timestep": torch.tensor([51, 1])},
        r"timestep is torch.int64 \(2,\), expected int64, \(3,\) or one",
    ),
    "prev_timestep": ({"prev_timestep": 0}, r"prev_timestep = \[0, 0, 0\]: expected \[1, 1, 1\]"),
    "eta": ({"eta": 0.0}, r"eta = 0\.0: must be positive"),
    "unset": ({"scheduler": ddim()}, r"call scheduler\.set_timesteps"),
    "clip": ({"scheduler": ddim(20, clip_sample=True)}, "clip_sample=True"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(changes, message):
    arguments = {"scheduler": ddim(20), "model_output": X, "timestep": 51, "sample": X, **changes}
    with pytest.raises(ValueError, match=message):
        inference_step(**arguments)


def test_step_index_of_dpm_solver():
    """It must agree with the timestep; the reference reads it instead, DDIM does not."""
    scheduler = DPMSolverSinglestepScheduler(**DPM)
    scheduler.set_timesteps(20)
    timestep = scheduler.timesteps[[4, 5, 6]]
    _, expected = inference_step(scheduler, X, timestep, X, prev_sample=X)
    _, score = inference_step(scheduler, X, timestep, X, prev_sample=X, step_index=torch.tensor([4, 5, 6]))
    assert torch.equal(score, expected)
    with pytest.raises(ValueError, match=r"step_index = \[1, 1, 1\]: expected \[4, 5, 6\]"):
        inference_step(scheduler, X, timestep, X, prev_sample=X, step_index=torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            FlowMatchEulerDiscreteScheduler,
            r"scheduler = FlowMatch.*: the reference has no flow matching\. Use fastnabla\.losses",
        ),
        (FlowMatchHeunDiscreteScheduler, "scheduler FlowMatchHeunDiscreteScheduler is not supported"),
    ],
)
def test_flow_matching_is_refused(kind: type, message: str):
    scheduler, x = kind(), torch.zeros(SHAPE)
    scheduler.set_timesteps(4)
    for call in (
        lambda: inference_step(scheduler, x, 1000, x),
        lambda: predict_clean(scheduler, x, x, 1000),
        lambda: get_alpha_prod_t(scheduler, 1000, x),
    ):
        with pytest.raises(ValueError, match=message):
            call()
