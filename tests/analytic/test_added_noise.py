"""Samplers of the analytic testbed: their noise schedules, and the distributions that a lower bound of σ leads to."""

import pytest
import torch

from fastnabla.analytic.added_noise import added_variance
from fastnabla.analytic.config import AnalyticConfig
from fastnabla.analytic.experiment import Experiment
from fastnabla.analytic.measures import distances, floors
from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.analytic.problems import PROBLEMS, Problem, ring
from fastnabla.analytic.scheduler import alpha_bars
from fastnabla.analytic.training import updates
from fastnabla.config.training_sections import RolloutConfig
from tests.checks import ddim, ddim_table

F64 = torch.float64
SAMPLERS = [
    {"schedule": "stable-diffusion", "min_sigma": 0.03},
    {"schedule": "stable-diffusion", "min_sigma": 0.09},
    {"schedule": "stable-diffusion", "spacing": "trailing", "min_sigma": 0.09},
    {"schedule": "log-snr", "min_sigma": 0.05},
    {"schedule": "log-snr", "spacing": "leading", "min_sigma": 0.05},
]
RAISED = (1, 2, 1, 8, 9)
"""How many of 50 steps each raises."""


def one_mode() -> Problem:
    mean, stds = torch.tensor([[0.6, -0.3]], dtype=F64), torch.tensor([[0.2, 0.7]], dtype=F64)
    return Problem(GaussianMixture(torch.ones(1, dtype=F64), mean, stds), ring().reward)


def moments(experiment: Experiment) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance `[2]` of the samples for one mode, where the network is affine in x: measured at x = 0 and x = 1."""
    table, prompt = experiment.table, torch.zeros(2, dtype=torch.int64)
    mean, variance = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    x = torch.stack([torch.zeros(2), torch.ones(2)]).view(2, 2, 1, 1)
    for i in range(len(table)):
        at_0, at_1 = experiment.policy(x, table.timestep[i].expand(2), prompt).flatten(1).double().detach()
        slope = table.a[i] + table.b[i] * (at_1 - at_0)
        mean, variance = slope * mean + table.b[i] * at_0, slope**2 * variance + table.sigma[i] ** 2
    return mean, variance


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_stable_diffusion_s_schedule(spacing):
    """diffusers computes the betas in float32."""
    assert torch.allclose(alpha_bars("stable-diffusion").float(), ddim().alphas_cumprod, rtol=1e-5, atol=0)
    subject = Experiment(AnalyticConfig(schedule="stable-diffusion", spacing=spacing))
    expected = ddim_table(50, timestep_spacing=spacing)
    assert torch.equal(subject.table.timestep, expected.timestep)
    torch.testing.assert_close(subject.table.sigma, expected.sigma, rtol=1e-3, atol=0)
    last = subject.reference.stds.square() - ring().mixture.stds.square() * (1 - 0.00085)
    torch.testing.assert_close(last, torch.full_like(last, 0.00085), rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "count"), zip(SAMPLERS, RAISED, strict=True), ids=str)
def test_the_reference_has_the_noise_that_the_bound_adds(sampler, count, monkeypatch):
    """For one mode, to the network's float32. If only the last step is raised, it is σ_min² − σ²."""
    monkeypatch.setitem(PROBLEMS, 2, one_mode)
    bounded = Experiment(AnalyticConfig(**sampler, samples=2000))
    unbounded = Experiment(AnalyticConfig(**sampler | {"min_sigma": None}))
    assert (bounded.table.sigma > unbounded.table.sigma).sum() == count
    mean, variance = moments(bounded)
    added = variance - moments(unbounded)[1]
    claimed = bounded.reference.stds.square() - unbounded.reference.stds.square()
    torch.testing.assert_close(claimed[0], added, rtol=1e-3, atol=0)
    if count == 1:
        expected = bounded.config.min_sigma**2 - unbounded.table.sigma[-1] ** 2
        torch.testing.assert_close(claimed, expected.expand(1, 2))
    if count < 3:
        samples = bounded.evaluation_samples()
        assert ((samples.mean(0) - mean).abs() / (variance / 2000).sqrt()).max() < 4
        assert ((samples.var(0) / variance - 1).abs() / (2 / 2000) ** 0.5).max() < 4
    target = bounded.reference.tilted(bounded.reward, 0.6 * bounded.table.alpha_bar_next[-1].item())
    torch.testing.assert_close(bounded.target.stds, target.stds)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [SAMPLERS[1], SAMPLERS[3]], ids=str)
def test_pretrained_samples_are_the_reference_s_for_several_modes(sampler):
    """As without a bound: below 2 floors. Without the added noise in the reference, the widths of the modes would differ."""
    subject = Experiment(AnalyticConfig(**sampler, samples=1000))
    floor, found = floors(subject.reference, 1000), distances(subject.evaluation_samples(), subject.reference)
    for name, distance in found.items():
        assert distance < 2 * floor[name], name


def test_without_a_bound_nothing_is_added():
    table = ddim_table(20)
    assert not added_variance(one_mode().mixture, table, table).any()


def test_a_run_with_another_sampler_trains():
    rollout = RolloutConfig(trajectories=8, fraction=0.5, updates=1)
    for sampler in SAMPLERS:
        subject = Experiment(AnalyticConfig(**sampler, updates=2, steps=10, width=8, samples=2, rollout=rollout))
        assert all(torch.tensor(list(record.values())).isfinite().all() for record in updates(subject))
