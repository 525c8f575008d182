"""The analytic testbed's networks, used by the classes that finetune Stable Diffusion."""

import pytest
import torch

from fastnabla.analytic.config import AnalyticConfig
from fastnabla.analytic.experiment import PROMPTS, Experiment, IdentityDecoder
from fastnabla.analytic.measures import distances, floors
from fastnabla.analytic.problems import PROBLEMS
from fastnabla.analytic.scheduler import alpha_bars
from fastnabla.config.training_sections import RolloutConfig
from tests.checks import randn, relative_error

PROMPT, TIMESTEP = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 19, 200, 500, 800, 999])


def experiment(**changes) -> Experiment:
    return Experiment(AnalyticConfig(**{"width": 16, "samples": 64} | changes))


def shaken(subject: Experiment) -> Experiment:
    """Perturb the networks, so that their outputs are not zero."""
    for parameters in (subject.policy.trainable(), subject.flow.parameters()):
        for i, parameter in enumerate(parameters):
            parameter.data += randn(*parameter.shape, seed=i)
    return subject


@pytest.mark.parametrize("dimension", PROBLEMS)
def test_reference_is_the_mixtures_noise_prediction_whatever_is_trained(dimension):
    subject, mixture = experiment(dimension=dimension), PROBLEMS[dimension]().mixture
    x = randn(6, dimension, 1, 1)
    exact = mixture.noise_prediction(x.flatten(1).double(), alpha_bars()[TIMESTEP])
    assert relative_error(subject.policy(x, TIMESTEP, PROMPT).flatten(1), exact) < 1e-6  # float32
    shaken(subject)
    assert relative_error(subject.policy.reference(x, TIMESTEP, PROMPT).flatten(1), exact) < 1e-6
    assert relative_error(subject.policy(x, TIMESTEP, PROMPT).flatten(1), exact) > 1e-2


def test_flow_starts_at_zero_and_vanishes_with_the_noise():
    subject, x = experiment(), randn(6, 2, 1, 1)
    assert not subject.flow(x, TIMESTEP, None).any()
    g = shaken(subject).flow(x, TIMESTEP, None)
    factor = (1 - alpha_bars()[TIMESTEP]).sqrt().float()[:, None, None, None]
    values = (g / factor).flatten(1).norm(dim=1)
    assert values.max() < 20 * values.min()  # so it is the factor, of 0.05 to 1, that makes g small at timestep 0
    assert g[0].norm() < 0.1 * g[-1].norm() * values[0] / values[-1]


def test_decoder_is_the_identity_and_differentiates_the_reward():
    reward, x = PROBLEMS[16]().reward, randn(5, 16, 1, 1)
    values, gradient = IdentityDecoder().reward_gradient(x, list(PROMPTS) * 5, reward)
    torch.testing.assert_close(values, reward(x, ()))
    torch.testing.assert_close(gradient.flatten(1).double(), reward.slope - reward.curvature * x.flatten(1).double())
    assert torch.equal(IdentityDecoder().decode(x), x)


@pytest.mark.slow
@pytest.mark.parametrize("dimension", PROBLEMS)
def test_pretrained_samples_are_the_mixtures(dimension):
    """With 100 steps the sampler's error is hidden by the noise of 1,000 samples, which stays below 2 floors. The target is
    more than 4 floors away."""
    subject = experiment(dimension=dimension, steps=100, samples=1000)
    found = distances(subject.evaluation_samples(), subject.reference)
    floor = floors(subject.reference, 1000)
    for name, distance in found.items():
        assert distance < 2 * floor[name], name
    for name, distance in distances(subject.evaluation_samples(), subject.target).items():
        assert distance > 4 * floor[name], name


def test_the_step_trains_policy_and_flow():
    """For residual ∇-DB: network passes as counted in `fastnabla.methods.passes`, and rewards of finished samples in the
    buffer."""
    subject = experiment(rollout=RolloutConfig(trajectories=8, fraction=0.5, updates=2))
    subject.source.collect(0)
    batch = subject.buffer.gather(subject.buffer.transitions())
    last = batch.step_index == len(subject.table) - 1
    torch.testing.assert_close(batch.reward[last], subject.reward(batch.x_next[last], ()))
    report = subject.step(subject.source.select(0, torch.arange(8)))
    assert report.passes == {"inner": 6, "last": 4}
    for parameters in (subject.policy.trainable(), list(subject.flow.parameters())):
        assert all(parameter.grad.isfinite().all() for parameter in parameters)
        assert any(parameter.grad.any() for parameter in parameters)
