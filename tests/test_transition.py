"""Tables of samplers against the reference implementation and diffusers, and the settings that are refused."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
)
from safetensors.torch import load_file

from fastnabla.objective.gaussian import step_score
from fastnabla.transition import TransitionTable
from tests.checks import DDIM, STABLE_DIFFUSION, ddim, ddim_table, randn, relative_error
from tests.golden import TRANSITION_SETS

PREDICTIONS = ("epsilon", "v_prediction", "sample")
DDPM = {**STABLE_DIFFUSION, "clip_sample": False, "steps_offset": 1}
DPM = {
    **STABLE_DIFFUSION,
    "algorithm_type": "sde-dpmsolver++",
    "solver_order": 1,
    "final_sigmas_type": "sigma_min",
}
CASES = [(path.parent, case) for path in TRANSITION_SETS for case in json.loads(path.read_text())["cases"]]


@pytest.mark.parametrize(
    ("folder", "case"),
    [
        pytest.param(
            folder, case, id=f"{folder.name}-{case['prediction_type']}-{case['num_inference_steps']}-{case['eta']}"
        )
        for folder, case in CASES
    ],
)
def test_agrees_with_the_reference(folder, case):
    """Scores to 2e-5: the reference's σ² has 1 − ᾱ/ᾱ' in float32, off by 1.3e-5 in the last row. x̂0 to 1e-6."""
    scheduler = json.loads((folder / "transitions.json").read_text())["scheduler"]
    numbers = load_file(folder / "transitions.safetensors")
    golden = {name.split(".")[1]: value for name, value in numbers.items() if name.startswith(f"{case['case']}.")}
    kind = case["prediction_type"]
    scheduler = DDIMScheduler(**scheduler, prediction_type=kind)
    table = TransitionTable.from_scheduler(scheduler, case["num_inference_steps"], case["eta"])
    rows = table.rows(golden["step_index"], golden["x_t"])
    output = golden["model_output"]

    assert torch.equal(rows.timestep, golden["timestep"].float())
    assert torch.equal(rows.timestep_next, golden["timestep_next"].float())
    assert relative_error(rows.alpha_bar.flatten(), golden["alpha_bar"]) < 1e-6
    assert relative_error(rows.alpha_bar_next.flatten(), golden["alpha_bar_next"]) < 1e-6
    score = case["pretrained_strength"] * step_score(output, golden["x_t"], golden["x_next"], rows)
    assert relative_error(score, golden["score"]) < 2e-5
    assert relative_error(rows.c * golden["x_t"] + rows.d * output, golden["x0_hat"]) < 1e-6
    clean_next = rows.c_next * golden["x_next"] + rows.d_next * output
    # At timestep 0 the state is clean, so x̂0 = x; the reference's sample-prediction returns the output there.
    same = golden["timestep_next"] > 0 if kind == "sample" else slice(None)
    assert relative_error(clean_next[same], golden["x0_hat_next"][same]) < 1e-6


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("eta", [1.0, 0.6])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_step(kind, eta, spacing):
    """diffusers computes its coefficients in float32, hence 1e-5."""
    scheduler = ddim(20, prediction_type=kind, timestep_spacing=spacing)
    table = TransitionTable.from_scheduler(scheduler, eta=eta)
    x, o, noise = (randn(2, 4, 8, 8, seed=seed) for seed in range(3))
    for i, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(o, timestep, x, eta=eta, variance_noise=noise).prev_sample
        assert relative_error(table.a[i] * x + table.b[i] * o + table.sigma[i] * noise, expected) < 1e-5


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ddpm_step(kind):
    """All rows but the last, which diffusers takes to ᾱ = 1 without noise: such a step has no density."""
    scheduler = DDPMScheduler(**DDPM, prediction_type=kind)
    scheduler.set_timesteps(20)
    table = TransitionTable.from_scheduler(scheduler)
    x, o, noise = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    for i, timestep in enumerate(scheduler.timesteps[:-1]):
        expected = scheduler.step(o, timestep, x, generator=torch.Generator().manual_seed(2)).prev_sample
        assert relative_error(table.a[i] * x + table.b[i] * o + table.sigma[i] * noise, expected) < 1e-5


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler])
def test_dpm_solver_step(solver, kind):
    """diffusers interpolates its noise levels in float32, hence 1e-5."""
    scheduler = solver(**DPM, prediction_type=kind)
    table = TransitionTable.from_scheduler(scheduler, 20)
    x, o, noise = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    scheduler.set_timesteps(20)
    assert torch.equal(table.timestep, scheduler.timesteps.float())
    for i, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(o, timestep, x, generator=torch.Generator().manual_seed(2)).prev_sample
        assert relative_error(table.a[i] * x + table.b[i] * o + table.sigma[i] * noise, expected) < 1e-5


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_clean_prediction_inverts_noising(kind):
    table = ddim_table(prediction_type=kind)
    clean, noise = randn(10, 4, 3, 3, dtype=torch.float64), randn(10, 4, 3, 3, seed=1, dtype=torch.float64)
    rows = table.rows(torch.arange(10), clean)
    signal, spread = rows.alpha_bar.sqrt(), (1 - rows.alpha_bar).sqrt()
    output = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - spread * clean}[kind]
    assert relative_error(rows.c * (signal * clean + spread * noise) + rows.d * output, clean) < 1e-12


def test_step_keeps_the_variance_of_noised_samples():
    """With the true output, x' = √ᾱ' x̂0 + noise of variance 1 − ᾱ': for ε-prediction (a√(1−ᾱ) + b)² + σ² = 1 − ᾱ'."""
    for eta in (0.3, 1.0):
        table = ddim_table(50, eta)
        spread = (table.a * (1 - table.alpha_bar).sqrt() + table.b) ** 2 + table.sigma**2
        torch.testing.assert_close(spread, 1 - table.alpha_bar_next, rtol=1e-12, atol=0)
        torch.testing.assert_close(table.a * table.alpha_bar.sqrt(), table.alpha_bar_next.sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_steps", [4, 5, 10, 25, 50])
def test_zero_terminal_snr_with_v_prediction(num_steps):
    """At ᾱ = 0 and η = 1 the share of ε̂ in the step is √0, which must not become √(−rounding)."""
    changes = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    table = ddim_table(num_steps, **changes)
    assert (table.alpha_bar[0], table.a[0]) == (0, 0)


def test_the_finished_sample_is_its_own_clean_prediction():
    for kind in PREDICTIONS:
        table = ddim_table(prediction_type=kind)
        assert (table.timestep_next[-1], table.c_next[-1], table.d_next[-1]) == (0, 1, 0)


def test_scheduler_is_not_changed():
    scheduler = ddim(20)
    before = scheduler.timesteps.clone()
    assert len(TransitionTable.from_scheduler(scheduler, 50)) == 50
    assert torch.equal(scheduler.timesteps, before)


def test_a_bound_of_sigma_bounds_the_scores():
    """The last two of 20 "leading" steps, 51 → 1 → 0, lose their weight."""
    table = ddim_table(20)
    bounded = table.with_min_sigma(0.1)
    weight, before = ((t.b / t.sigma**2).abs() for t in (bounded, table))
    assert before[18] > 130 and before[19] > 45
    torch.testing.assert_close(weight[18:], table.b[18:].abs() / 0.01)
    assert torch.equal(weight[:18], before[:18]) and weight.max() < 25
    assert table.sigma[19] < 0.03  # not changed in place
    assert bounded.packed(torch.device("cpu"))[18, 3] == pytest.approx(100)


@pytest.mark.parametrize("least", [0.0, -1.0, float("nan"), float("inf"), 0.7])
def test_rejects_a_bound_that_is_no_bound(least):
    with pytest.raises(ValueError, match=rf"min_sigma = {least}: must be positive and below the largest σ.*, 0\.644"):
        ddim_table(20).with_min_sigma(least)


def test_rows_broadcast_in_the_precision_of_the_state():
    table = ddim_table()
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        rows = table.rows(torch.tensor([9, 0]), randn(2, 4, 8, 8).to(dtype))
        assert rows.sigma.shape == (2, 1, 1, 1)
        assert rows.sigma.dtype == expected
        assert torch.equal(rows.timestep, table.timestep[[9, 0]])


def test_step_index_round_trip():
    table = ddim_table(50)
    step = torch.tensor([[49, 0], [7, 7]])
    assert torch.equal(table.step_index(table.timestep[step]), step)


def test_stray_timestep():
    with pytest.raises(ValueError, match=r"timestep 3 is not one of the sampler's 10: 901, 801, "):
        ddim_table().step_index(torch.tensor([901, 3]))


REJECTED = {
    "clip_sample": (DDIMScheduler, {"clip_sample": True}, ("clip_sample=True", "Set clip_sample=False")),
    "thresholding": (DDIMScheduler, {"thresholding": True}, ("thresholding=True", "Set thresholding=False")),
    "linspace": (DDIMScheduler, {"timestep_spacing": "linspace"}, ("timestep_spacing='linspace'", "'leading'")),
    "steps_offset": (DDIMScheduler, {"steps_offset": 0}, ("sigma", "timestep 0", "steps_offset=1")),
    "zero_snr_epsilon": (
        DDIMScheduler,
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ("zero terminal SNR", "rescale_betas_zero_snr=False"),
    ),
    "variance_type": (
        DDPMScheduler,
        {"variance_type": "fixed_large"},
        ("variance_type='fixed_large'", "'fixed_small'"),
    ),
    "ode": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}, ("algorithm_type", "'sde-dpmsolver++'")),
    "solver_order": (DPMSolverMultistepScheduler, {"solver_order": 2}, ("solver_order=2", "Set solver_order=1")),
    "final_sigma": (DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}, ("final_sigmas_type", "'sigma_min'")),
    "karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, ("use_karras_sigmas=True", "=False")),
    "scheduler": (EulerAncestralDiscreteScheduler, {}, ("EulerAncestralDiscreteScheduler", "Use DDIMScheduler")),
}


@pytest.mark.parametrize(("scheduler", "settings", "words"), REJECTED.values(), ids=REJECTED)
def test_rejects_settings_without_gaussian_steps(scheduler, settings, words):
    base = {DDIMScheduler: DDIM, DDPMScheduler: DDPM, DPMSolverMultistepScheduler: DPM}.get(scheduler, {})
    with pytest.raises(ValueError) as error:
        TransitionTable.from_scheduler(scheduler(**{**base, **settings}), 20)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("eta", [0.0, -1.0, float("nan"), float("inf")])
def test_rejects_eta(eta):
    with pytest.raises(ValueError, match=r"eta = .*must be positive and finite"):
        ddim_table(eta=eta)


def test_rejects_more_noise_than_the_next_state_has():
    with pytest.raises(ValueError, match="eta > 1"):
        ddim_table(20, eta=1.2)


def test_rejects_eta_where_there_is_none():
    with pytest.raises(ValueError, match=r"eta = 0\.5: DDPMScheduler has no eta\. Use DDIMScheduler"):
        TransitionTable.from_scheduler(DDPMScheduler(**DDPM), 20, eta=0.5)


def test_rejects_a_scheduler_without_timesteps():
    with pytest.raises(ValueError, match=r"call scheduler\.set_timesteps\(n\) or pass num_inference_steps"):
        TransitionTable.from_scheduler(ddim())


def test_rejects_timesteps_beyond_the_last_trained_one():
    with pytest.raises(ValueError, match=r"steps_offset=1 with 1000 steps"):
        TransitionTable.from_scheduler(DDIMScheduler(**DDPM | {"steps_offset": 1}), 1000)
