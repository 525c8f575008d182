"""Tables of flow matching against the named samplers, written out here, against diffusers, and against variance-preserving
tables."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from fastnabla.flow_matching_coefficients import dynamic_shift
from fastnabla.objective.noising import check_is_ddpm
from fastnabla.transition import TransitionTable
from tests.checks import ddim, ddim_table, flow_table, matched_flow_table, randn, relative_error

EXACT = {"rtol": 1e-12, "atol": 1e-13}
"""Float64 formulas in another order."""
ETA = {"ddim": 1.0, "flow-sde": 0.7, "dance": 0.3, "cps": 0.8}
STEPS = [1, 4, 28]
FLUX = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}


def flow_grpo(x: Tensor, o: Tensor, sigmas: Tensor, i: int, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of `sde_step_with_logprob` of Flow-GRPO."""
    sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    std = torch.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma))) * eta
    mean = x * (1 + std**2 / (2 * sigma) * dt) + o * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std * torch.sqrt(-dt)


def dance_grpo(x: Tensor, o: Tensor, sigmas: Tensor, i: int, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of `flux_step` of DanceGRPO: Euler's step and half of η² times the score."""
    sigma, step = sigmas[i], sigmas[i + 1] - sigmas[i]
    score = -(x - (x - sigma * o) * (1 - sigma)) / sigma**2
    return x + step * o - 0.5 * eta**2 * score * step, eta * torch.sqrt(-step)


def cps(x: Tensor, o: Tensor, sigmas: Tensor, i: int, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of coefficients-preserving sampling."""
    sigma, after = sigmas[i], sigmas[i + 1]
    std = after * math.sin(eta * math.pi / 2)
    clean, noise = x - sigma * o, x + o * (1 - sigma)
    return clean * (1 - after) + noise * torch.sqrt(after**2 - std**2), std


def ddpm(x: Tensor, o: Tensor, sigmas: Tensor, i: int, eta: float) -> tuple[Tensor, Tensor]:
    """The posterior of x_s given x_t and the clean sample: the product of two Gaussian densities of x_s, by their precisions."""
    t, s, clean = sigmas[i], sigmas[i + 1], x - sigmas[i] * o
    scale = (1 - t) / (1 - s)  # x_t = scale x_s + noise
    noise = t**2 - scale**2 * s**2
    precision = 1 / s**2 + scale**2 / noise
    return ((1 - s) * clean / s**2 + scale * x / noise) / precision, precision.rsqrt()


NAMED = {"ddim": ddpm, "flow-sde": flow_grpo, "dance": dance_grpo, "cps": cps}


@pytest.mark.parametrize("rows", NAMED)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rows_are_the_named_steps(rows: str, steps: int, shift: float) -> None:
    """All rows of Flow-GRPO and DanceGRPO; of DDPM and CPS all but the last, which would have no noise."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    table = TransitionTable.from_scheduler(scheduler, eta=ETA[rows], rows=rows)
    x, o = randn(3, 5, dtype=torch.float64), randn(3, 5, seed=1, dtype=torch.float64)
    for i in range(steps - (rows in ("ddim", "cps"))):
        mean, std = NAMED[rows](x, o, scheduler.sigmas.double(), i, ETA[rows])
        torch.testing.assert_close(table.a[i] * x + table.b[i] * o, mean, **EXACT)
        torch.testing.assert_close(table.sigma[i], std, **EXACT)


@pytest.mark.parametrize("eta", [0.5, 0.9])
def test_ddim_keeps_the_marginals_of_a_point(eta: float) -> None:
    """Data in one point p, whose velocity is (x − p)/t: every step of DDIM and CPS goes from N((1−t)p, t²) to N((1−s)p, s²)."""
    for rows in ("ddim", "cps"):
        table = flow_table(28, eta, rows=rows, end=0.01)
        t, s = -table.d, table.noise_std_next
        slope = table.a + table.b / t
        torch.testing.assert_close(slope * (1 - t) - table.b / t, 1 - s, **EXACT)
        torch.testing.assert_close((slope * t).square() + table.sigma.square(), s.square(), **EXACT)


@pytest.mark.parametrize("rows", NAMED)
@pytest.mark.parametrize("steps", STEPS)
def test_the_last_row_is_the_clean_sample_with_noise(rows: str, steps: int) -> None:
    """Of data in one point p, finished samples are N(p, n²) with the table's n."""
    table = flow_table(steps, ETA[rows], rows=rows)
    t, a, b, sigma = -table.d[-1], table.a[-1], table.b[-1], table.sigma[-1]
    slope = a + b / t
    torch.testing.assert_close(slope * (1 - t) - b / t, torch.ones_like(t), **EXACT)
    torch.testing.assert_close((slope * t).square() + sigma.square(), table.noise_std_next[-1].square(), **EXACT)
    assert (table.timestep_next[-1], table.alpha_bar_next[-1], table.c_next[-1], table.d_next[-1]) == (0, 1, 1, 0)
    if rows in ("ddim", "cps"):
        assert (a, b, sigma) == (1, -t, 0.02)


@pytest.mark.parametrize("steps", STEPS)
def test_euler_is_diffusers_own_step(steps: int) -> None:
    """To float32 rounding; the last row ends at the clean sample, and the sampler is not memoryless."""
    scheduler, table = FlowMatchEulerDiscreteScheduler(shift=3.0), flow_table(steps, rows="euler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    x, o = randn(2, 3, 5)
    for i, timestep in enumerate(scheduler.timesteps):
        step = scheduler.step(o, timestep, x, return_dict=False)[0]
        torch.testing.assert_close((table.a[i] * x + table.b[i] * o).float(), step, rtol=1e-6, atol=1e-6)
    assert table.is_deterministic and table.is_flow_matching and (table.sigma == 0).all()
    assert abs(table.memory()) == pytest.approx(float(steps > 1)) and table.noise_std_next[-1] == 0
    assert not flow_table(steps).is_deterministic and not ddim_table().is_flow_matching
    with pytest.raises(ValueError, match=r"eta = 0\.5: has no effect with rows = 'euler'"):
        flow_table(steps, 0.5, rows="euler")


def test_one_step_without_noise_has_no_density() -> None:
    table = flow_table(4)
    sigma = torch.cat([table.sigma[:-1], table.sigma.new_zeros(1)])
    with pytest.raises(ValueError, match=r"sigma\[3\] = 0\.0"):
        dataclasses.replace(table, sigma=sigma)


def test_the_noise_of_a_last_row_is_at_most_its_level() -> None:
    table = flow_table(100, shift=1.0)
    assert table.sigma[-1] == -table.d[-1] == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("rows", ["ddim", "flow-sde", "dance"])
def test_many_steps_sample_gaussian_data(rows: str) -> None:
    """N(2, ½²), whose velocity is linear: mean and variance of finished samples tend to the data's as 1/T, up to the noise that
    the last row leaves. CPS, whose noise per step does not vanish with the step, is not among them."""
    center, variance = 2.0, 0.25

    def moments(steps: int) -> tuple[float, float]:
        table, mean, spread = flow_table(steps, ETA[rows], rows=rows), 0.0, 1.0
        for i in range(steps):
            t, a, b = (value.item() for value in (-table.d[i], table.a[i], table.b[i]))
            # E[ε − x0 | x] = slope (x − (1 − t) center) − center
            slope = (t - (1 - t) * variance) / (t**2 + (1 - t) ** 2 * variance)
            mean = a * mean + b * (slope * (mean - (1 - t) * center) - center)
            spread = (a + b * slope) ** 2 * spread + table.sigma[i].item() ** 2
        return mean - center, spread - variance

    errors = [moments(steps) for steps in (500, 2000)]
    assert all(abs(mean) < 0.02 and abs(spread) < 0.01 for mean, spread in errors[1:])
    assert abs(errors[1][1]) < 0.5 * abs(errors[0][1])


@pytest.mark.parametrize("rows", NAMED)
def test_without_noise_all_rows_are_eulers(rows: str) -> None:
    """To order η², and η for the mean of the first step of CPS and DDIM; against diffusers in float32."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    table = TransitionTable.from_scheduler(scheduler, eta=1e-7, rows=rows)
    torch.testing.assert_close(table.a, torch.ones_like(table.a), rtol=0, atol=1e-12)
    torch.testing.assert_close(table.b, scheduler.sigmas.diff().double(), rtol=0, atol=1e-12)
    assert (table.sigma[:-1] < 1e-6).all()
    x, o = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for i, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(o, timestep, x).prev_sample
        assert relative_error(table.a[i] * x + table.b[i] * o, expected) < 1e-6


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_rows_are_variance_preserving_ones_in_other_units(eta: float, spacing: str) -> None:
    """On matched signal-to-noise ratios y = k x with k = 1/(√ᾱ + √(1−ᾱ)), and v = (ε − y)/(1 − t): means, noise, noising kernel and
    the factor b/σ of ε are the same, to 2e-14."""
    scheduler = ddim(10, timestep_spacing=spacing)
    plain = TransitionTable.from_scheduler(scheduler, eta=eta)
    flow = matched_flow_table(plain, eta)
    k, k_next = (1 / (share.sqrt() + (1 - share).sqrt()) for share in (plain.alpha_bar, plain.alpha_bar_next))
    t = -flow.d
    close = {"rtol": 2e-14, "atol": 2e-14}
    torch.testing.assert_close(1 - t, k * plain.alpha_bar.sqrt(), **close)
    x, noise = randn(10, dtype=torch.float64), randn(10, seed=1, dtype=torch.float64)
    velocity = (noise - k * x) / (1 - t)
    torch.testing.assert_close(
        flow.a * k * x + flow.b * velocity, k_next * (plain.a * x + plain.b * noise), rtol=2e-14, atol=1e-13
    )
    clean = plain.c * x + plain.d * noise
    torch.testing.assert_close(flow.c * k * x + flow.d * velocity, clean, rtol=2e-14, atol=1e-13)
    torch.testing.assert_close(flow.sigma, k_next * plain.sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(flow.noising_scale, plain.noising_scale * k / k_next, **close)
    torch.testing.assert_close(flow.noising_std, plain.noising_std * k, rtol=1e-12, atol=0)
    torch.testing.assert_close(flow.b / flow.sigma / (1 - t), plain.b / plain.sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", NAMED)
@pytest.mark.parametrize("end", [0.0, 0.01])
def test_the_noising_kernel_leads_from_level_to_level(rows: str, end: float) -> None:
    table = flow_table(28, ETA[rows], rows=rows, end=end)
    scale, std = table.noising_scale, table.noising_std
    torch.testing.assert_close(scale * table.alpha_bar_next.sqrt(), table.alpha_bar.sqrt(), **EXACT)
    spread = (scale * table.noise_std_next).square() + std.square()
    torch.testing.assert_close(spread, table.noise_std.square(), **EXACT)
    assert table.is_chain()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("rows", [*NAMED, "euler"])
def test_only_rows_that_would_have_no_noise_end_at_the_prediction(rows: str, steps: int) -> None:
    """A bound on σ does not change that, and an end before the clean sample does."""
    eta, own = ETA.get(rows, 1.0), rows in ("ddim", "cps", "euler")
    table = flow_table(steps, eta, rows=rows)
    assert table.ends_at_prediction == own
    assert not flow_table(steps, eta, rows=rows, end=0.01).ends_at_prediction
    if rows != "euler" and steps > 1:
        assert table.with_min_sigma(0.05).ends_at_prediction == own


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_variance_preserving_ddim_rows_never_end_at_the_prediction(kind: str, spacing: str) -> None:
    for eta in (0.3, 1.0):
        assert not ddim_table(10, eta, prediction_type=kind, timestep_spacing=spacing).ends_at_prediction


def test_ddpm_rows_are_reversed_by_the_noising_kernel() -> None:
    check_is_ddpm(flow_table(28, end=0.01), "db")
    with pytest.raises(ValueError, match=r"method = 'db': the sampler ends at the clean sample.* end > 0"):
        check_is_ddpm(flow_table(28), "db")
    said = r"method = 'dag': DDPM's noising kernel reverses DDPM's steps only; set sampler\."
    for rows, eta in (("ddim", 0.9), ("cps", 0.8), ("cps", 1.0), ("dance", 0.3), ("flow-sde", 0.7), ("flow-sde", 1.0)):
        with pytest.raises(ValueError, match=rf"{said}scheduler = ddim and sampler\.eta = 1\."):
            check_is_ddpm(flow_table(28, eta, rows=rows, end=0.01), "dag")
    with pytest.raises(ValueError, match=rf"{said}min_sigma = None\."):
        check_is_ddpm(flow_table(28, end=0.01).with_min_sigma(0.1), "dag")


def correlation(table: TransitionTable, slope: Tensor) -> float:
    """Of x_T and x_0 for the network ``o = slope x``, from the covariance matrix of (x_0, x_i, noise of the step)."""
    covariance = torch.ones(2, 2, dtype=torch.float64)
    for a, b, sigma, k in zip(table.a, table.b, table.sigma, slope, strict=True):
        step = torch.diag(torch.stack([torch.ones_like(a), a + b * k]))
        covariance = step @ covariance @ step
        covariance[1, 1] += sigma**2
    return (covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()).item()


@pytest.mark.parametrize(
    ("rows", "eta", "low", "high"),
    [
        ("ddim", 1.0, 0.0, 0.0),
        ("ddim", 1e-6, 0.999, 1.0),
        ("flow-sde", 0.7, 0.185, 0.195),
        ("dance", 0.3, 0.92, 0.94),
        ("cps", 0.7, 0.0, 1e-3),
    ],
)
def test_memory_of_flows(rows: str, eta: float, low: float, high: float) -> None:
    """28 steps with a shift of 3. The optimal velocity of standard Gaussian data is E[ε − x0 | x] = (2t − 1) x / (t² + (1 − t)²)."""
    table = flow_table(28, eta, rows=rows)
    t = -table.d
    expected = correlation(table, (2 * t - 1) / (t**2 + (1 - t) ** 2))
    assert table.memory() == pytest.approx(expected, abs=1e-14)
    assert low <= table.memory() <= high


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_memory_of_variance_preserving_samplers(eta: float) -> None:
    """Of standard Gaussian data ε̂ = √(1 − ᾱ) x, whatever the network predicts. With η = 1 it is √ᾱ of the first state, up to
    the order of the steps: that state is taken for noise, but has a signal."""
    table = ddim_table(50, eta)
    expected = correlation(table, (1 - table.alpha_bar).sqrt())
    for kind in ("epsilon", "v_prediction", "sample"):
        assert ddim_table(50, eta, prediction_type=kind).memory() == pytest.approx(expected, rel=1e-10)
    assert expected == pytest.approx(table.alpha_bar[0].sqrt().item(), abs=0.01) if eta == 1 else expected > 0.5


@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0, 6.0])
def test_a_static_shift_is_applied_once(shift: float) -> None:
    """diffusers computes it in float32, so to 1e-6."""
    t = torch.linspace(1, 1 / 20, 20, dtype=torch.float64)
    table = TransitionTable.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), 20)
    torch.testing.assert_close(-table.d, shift * t / (1 + (shift - 1) * t), rtol=1e-6, atol=0)
    torch.testing.assert_close(table.timestep.double(), -1000 * table.d, rtol=1e-6, atol=0)


def test_a_shift_whose_rounding_leaves_one_starts_at_one() -> None:
    """In float32 diffusers shifts 1 to 1 ± 1e-7 for every thirteenth of these: a start that Flow-GRPO's g would not survive."""
    for shift in np.arange(1, 12, 0.05):
        table = TransitionTable.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=float(shift)), 8, rows="flow-sde")
        assert table.d[0] == -1 and table.sigma[0] < 5, shift


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_dynamic_shift_is_flux_s(tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**FLUX)
    mu = dynamic_shift(tokens, scheduler.config)
    assert mu == pytest.approx(calculate_shift(tokens, 256, 4096, 0.5, 1.15), rel=1e-12)
    t = torch.linspace(1, 1 / 20, 20, dtype=torch.float64)
    table = TransitionTable.from_scheduler(scheduler, 20, mu=mu)
    torch.testing.assert_close(-table.d, math.exp(mu) / (math.exp(mu) + 1 / t - 1), rtol=1e-6, atol=0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20), mu=mu)
    assert torch.equal(TransitionTable.from_scheduler(scheduler).timestep, table.timestep)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"shift_terminal": 0.1},
        {**FLUX, "time_shift_type": "linear"},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_noise_levels_are_the_scheduler_s(settings: dict) -> None:
    scheduler, mu = FlowMatchEulerDiscreteScheduler(**settings), 0.8 if "use_dynamic_shifting" in settings else None
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12), mu=mu)
    table = TransitionTable.from_scheduler(FlowMatchEulerDiscreteScheduler(**settings), 12, mu=mu)
    assert torch.equal(-table.d.float(), scheduler.sigmas[:-1]) and torch.equal(table.timestep, scheduler.timesteps)
    assert not torch.allclose(-table.d, torch.linspace(1, 1 / 12, 12, dtype=torch.float64), atol=1e-2)


def test_a_set_shift_counts_and_the_scheduler_is_not_changed() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_shift(3.0)
    scheduler.set_timesteps(10)
    before = (scheduler.sigmas.clone(), scheduler.timesteps.clone())
    assert torch.equal(TransitionTable.from_scheduler(scheduler, 28).d, flow_table(28).d)
    assert torch.equal(scheduler.sigmas, before[0]) and torch.equal(scheduler.timesteps, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_timesteps_find_their_rows(dtype: torch.dtype) -> None:
    """In float64 they are 1000 σ of the float32 σ, which rounds to diffusers' float32 product."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.001, 999))
    table = TransitionTable.from_scheduler(scheduler)
    timesteps = scheduler.timesteps if dtype == torch.float32 else 1000 * scheduler.sigmas[:-1].double()
    assert torch.equal(table.step_index(timesteps), torch.arange(999))
    with pytest.raises(ValueError, match=r"timestep 999\.999 is not one of the sampler's 999: 1000, 999\.6"):
        table.step_index(torch.tensor([999.999]))


def changed(levels: list[float], **settings: object) -> FlowMatchEulerDiscreteScheduler:
    """A scheduler with these sigmas, whatever they are."""
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.set_timesteps(sigmas=levels[:-1])
    scheduler.sigmas = torch.tensor(levels)
    return scheduler


FLOW = FlowMatchEulerDiscreteScheduler
WRONG = {
    "rows": ((FLOW(), 8), {"rows": "ode"}, "rows = 'ode': must be one of ddim, flow-sde, dance, cps"),
    "no noise": ((FLOW(), 8, 0.0), {}, r"eta = 0\.0: must be above 0 and at most 1 with rows = 'ddim'"),
    "too much noise": ((FLOW(), 8, 1.01), {"rows": "cps"}, r"eta = 1\.01: must be above 0 and at most 1 with rows = 'cps'"),
    "infinite": ((FLOW(), 8, math.inf), {"rows": "dance"}, "eta = inf: must be positive and finite with rows = 'dance'"),
    "nan": ((FLOW(), 8, math.nan), {}, "eta = nan: must be above 0"),
    "stochastic": ((FLOW(stochastic_sampling=True), 8), {}, r"stochastic_sampling=True: .*that of rows='cps' with eta=1"),
    "inverted": ((FLOW(invert_sigmas=True), 8), {}, r"invert_sigmas=True: .*Set invert_sigmas=False"),
    "no mu": ((FLOW(**FLUX), 8), {}, r"mu = None: .*use_dynamic_shifting=True.*Pass mu=dynamic_shift"),
    "mu": ((FLOW(), 8), {"mu": 0.5}, r"mu = 0\.5: has no effect, the scheduler has use_dynamic_shifting=False"),
    "late mu": ((FLOW(**FLUX),), {"mu": 0.5}, r"mu = 0\.5: has no effect without num_inference_steps"),
    "no timesteps": ((FLOW(),), {}, r"call scheduler\.set_timesteps or pass num_inference_steps=n"),
    "end": ((FLOW(), 8), {"end": 0.125}, r"end = 0\.125: must be at least 0 and below the noise level .*, 0\.125"),
    "negative end": ((FLOW(), 8), {"end": -0.1}, r"end = -0\.1: must be at least 0"),
    "above one": ((changed([1.5, 0.5, 0.0]),), {}, r"scheduler\.sigmas\[0\] = 1\.5: noise levels must fall from at most 1 to 0"),
    "above zero": ((changed([1.0, 0.5, 0.1]),), {}, r"scheduler\.sigmas\[2\] = 0\.1\d*: noise levels must fall"),
    "rising": ((changed([1.0, 0.5, 0.5, 0.0]),), {}, r"scheduler\.(sigmas|timesteps)\[2\] = .*: must be below the one before, "),
    "not finite": ((changed([1.0, math.nan, 0.0]),), {}, r"scheduler\.sigmas\[1\] = nan: must be below the one before, 1\.0"),
    "rows of ddim": ((ddim(8), 8), {"rows": "cps"}, "rows = 'cps': only flow schedulers have it, not DDIMScheduler"),
    "mu of ddim": ((ddim(8), 8), {"mu": 0.5}, r"mu = 0\.5: only flow schedulers have it"),
    "end of ddim": ((ddim(8), 8), {"end": 0.1}, r"end = 0\.1: only flow schedulers have it"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "settings", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments: tuple, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransitionTable.from_scheduler(*arguments, **settings)
