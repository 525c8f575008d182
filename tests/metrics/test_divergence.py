"""KL along trajectories, in float64 against torch.distributions, and through a rollout."""

import copy

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from fastnabla.metrics.divergence import TrajectoryDivergence, divergence_summary, step_divergence
from fastnabla.objective.gaussian import guide
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.draws import draw_stratified
from fastnabla.trajectories.rollout import sample
from fastnabla.utils.seeding import seed_of
from tests.checks import ddim_table, flow_table, randn, relative_error
from tests.small_step import small_step

SHAPE = (4, 8, 8)
TABLE = ddim_table(4, eta=0.8)
PROMPT = torch.tensor([0, 1, 2, 1, 0])
SEEDS = [seed_of(7, "noise", i) for i in range(5)]


@pytest.fixture(scope="module")
def policy():
    return small_step().policy


def steps_of(o, o_ref, x, step):
    """The two policies' distributions of x', as torch distributions."""
    a, b, sigma = (getattr(TABLE, name)[step] for name in ("a", "b", "sigma"))
    return tuple(Independent(Normal(a * x + b * output, sigma), 3) for output in (o, o_ref))


def test_an_ode_has_no_divergence(policy) -> None:
    with pytest.raises(ValueError, match="its steps have no noise"):
        TrajectoryDivergence(policy, flow_table(4, rows="euler"), PROMPT)


def test_the_summary_in_closed_form() -> None:
    """Outputs that differ by a constant d: step t has (b/σ)² ‖d‖² / 2, in all trajectories. Trajectory n has n times it."""
    x, o, difference = randn(3, 5, *SHAPE, dtype=torch.float64)
    difference = difference[:1].expand_as(o)
    table = ddim_table(10)
    scale = torch.arange(5, dtype=torch.float64)
    steps = torch.stack(
        [
            scale * step_divergence(o + difference, o, table.rows(torch.full((5,), step), x))
            for step in range(len(table))
        ],
        1,
    )
    each = 0.5 * (table.b / table.sigma).square() * difference[0].square().sum()
    found = divergence_summary(steps)
    assert found["by_step"] == pytest.approx((2 * each).tolist())  # the mean of 0, …, 4 is 2, their variance 2.5
    assert found["nats"] == pytest.approx(2 * each.sum().item())
    assert found["standard_error"] == pytest.approx((2.5 / 5) ** 0.5 * each.sum().item())
    assert found["without_last_two"] == pytest.approx(2 * each[:-2].sum().item())
    assert found["without_last_two_standard_error"] == pytest.approx((2.5 / 5) ** 0.5 * each[:-2].sum().item())
    assert divergence_summary(steps[:, :2])["without_last_two"] == 0


@pytest.mark.parametrize("step", range(4))
def test_a_steps_divergence_is_that_of_its_gaussians(step: int) -> None:
    x, o, o_ref = randn(3, 6, *SHAPE, dtype=torch.float64)
    rows = TABLE.rows(torch.full((6,), step), x)
    expected = kl_divergence(*steps_of(o, o_ref, x, step))
    # Exact but for rounding: torch subtracts means that share a x.
    torch.testing.assert_close(step_divergence(o, o_ref, rows), expected, rtol=1e-10, atol=0)


def test_along_the_policys_own_states_in_float64(policy) -> None:
    """Guided outputs of a real network and its LoRA in float64, along the policy's trajectory."""
    policy = copy.deepcopy(policy).double()
    policy.dtype = torch.float64
    divergence = TrajectoryDivergence(policy, TABLE, PROMPT)
    x = randn(5, *SHAPE, dtype=torch.float64)
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for step in range(4):
        timestep = TABLE.timestep[step].expand(5)
        with torch.no_grad():
            o, o_ref = (
                guide(network(x, timestep, PROMPT), policy.guidance_scale) for network in (policy, policy.reference)
            )
        distribution, reference = steps_of(o, o_ref, x, step)
        expected[:, step] = kl_divergence(distribution, reference)
        x_next = distribution.mean + TABLE.sigma[step] * randn(5, *SHAPE, seed=step, dtype=torch.float64)
        for slots in (torch.arange(2), torch.arange(2, 5)):
            divergence.append(slots, step, x[slots], o[slots], x_next[slots])
        x = x_next
    assert (expected > 0).all()
    # Networks' matrix products are summed in another order for other batches: 1e-13 of the outputs.
    torch.testing.assert_close(divergence.steps, expected, rtol=1e-9, atol=0)


def test_is_measured_while_a_rollout_samples(policy) -> None:
    """The result equals that of the states and outputs in a buffer for any batch size, and the samples are unchanged."""
    buffer = TrajectoryBuffer(5, 4, 5, SHAPE)
    slots = buffer.reserve(draw_stratified(0, 0, 5, 4, 4), PROMPT)
    finished = sample(policy, TABLE, PROMPT, SEEDS, SHAPE, buffer=buffer, slots=slots)
    batch = buffer.gather(buffer.transitions())
    rows = TABLE.rows(batch.step_index, batch.x)
    with torch.no_grad():
        o_ref = guide(policy.reference(batch.x, rows.timestep, batch.prompt), policy.guidance_scale)
    expected = torch.zeros(5, 4)
    expected[batch.trajectory, batch.step_index] = step_divergence(batch.model_output, o_ref, rows)

    divergence = TrajectoryDivergence(policy, TABLE, PROMPT)
    again = sample(policy, TABLE, PROMPT, SEEDS, SHAPE, batch=2, buffer=divergence, slots=torch.arange(5))
    assert relative_error(again, finished) < 1e-5  # float32, in batches of another size
    # The difference of two outputs that agree to a few per cent, squared: some 1e-4 of it is rounding.
    assert relative_error(divergence.steps, expected) < 1e-3


def test_of_the_pretrained_policy_is_zero(policy) -> None:
    policy = copy.deepcopy(policy)
    with torch.no_grad():
        for name, parameter in policy.trained().items():
            if "lora_B" in name:
                parameter.zero_()
    divergence = TrajectoryDivergence(policy, TABLE, PROMPT)
    sample(policy, TABLE, PROMPT, SEEDS, SHAPE, buffer=divergence, slots=torch.arange(5))
    # W x + B A x with B = 0 adds zeros, but may round W x in another order.
    assert divergence.steps.max() < 1e-6
