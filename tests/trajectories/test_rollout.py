"""Sampling with the policy: noise by seed, whatever the batch, and the stored transitions."""

import pytest
import torch

from fastnabla.objective.gaussian import guide
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.draws import draw_stratified
from fastnabla.trajectories.rollout import sample
from fastnabla.utils.seeding import STREAMS, TrajectoryNoise, generator_of, seed_of
from tests.checks import ddim_table, flow_table, relative_error
from tests.small_step import small_step

SHAPE = (4, 8, 8)
TABLE = ddim_table(4, eta=0.8)
PROMPT = torch.tensor([0, 1, 2, 1, 0])
SEEDS = [seed_of(7, "noise", i) for i in range(5)]


@pytest.fixture(scope="module")
def policy():
    return small_step().policy


def rollout(policy, batch, seeds=SEEDS, table=TABLE, **settings):
    """Finished latents and the buffered transitions; every step kept."""
    buffer = TrajectoryBuffer(5, 4, 5, SHAPE)
    steps = draw_stratified(0, 0, 5, 4, 4)
    finished = sample(
        policy,
        table,
        PROMPT,
        seeds,
        SHAPE,
        batch=batch,
        buffer=buffer,
        slots=buffer.reserve(steps, PROMPT),
        **settings,
    )
    return finished, buffer.gather(buffer.transitions())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_do_not_matter(policy, batch):
    """The noise is the same to the bit. The network's matrix products are not: their order of summation depends on
    the batch, hence 1e-5."""
    finished, transitions = rollout(policy, None)
    same, others = rollout(policy, batch)
    assert relative_error(same, finished) < 1e-5
    for name in ("x", "x_next", "model_output"):
        assert relative_error(getattr(others, name), getattr(transitions, name)) < 1e-5
    for name in ("step_index", "prompt", "trajectory"):
        assert torch.equal(getattr(others, name), getattr(transitions, name))


@pytest.mark.parametrize("table", [TABLE, flow_table(4)], ids=["ddim", "flow"])
def test_transitions_satisfy_the_step_equation(policy, table):
    """``x' = a x + b o + σ ε`` with the seeds' noise, o the policy's guided output at x, and x_T the last x'. The buffer keeps
    numbers of steps, whose timesteps need not be whole."""
    finished, batch = rollout(policy, None, table=table)
    noise = TrajectoryNoise(SEEDS, SHAPE, "cpu")
    draws = torch.stack([noise.draw() for _ in range(5)])
    rows = table.rows(batch.step_index, batch.x)
    expected = (
        rows.a * batch.x + rows.b * batch.model_output + rows.sigma * draws[batch.step_index + 1, batch.trajectory]
    )
    torch.testing.assert_close(batch.x_next, expected, rtol=1e-5, atol=1e-5)
    first = batch.step_index == 0
    assert torch.equal(batch.x[first], draws[0, batch.trajectory[first]])
    last = batch.step_index == 3
    assert torch.equal(batch.x_next[last], finished[batch.trajectory[last]])
    with torch.no_grad():
        o = guide(policy(batch.x, rows.timestep, batch.prompt), policy.guidance_scale)
    assert relative_error(batch.model_output, o) < 1e-5


@pytest.mark.parametrize("rows", ["ddim", "cps"])
def test_without_final_noise_a_flow_s_samples_are_the_last_mean(policy, rows):
    """x̂0 = x − t o of the last state that the rollout with noise has recorded, to float32 rounding. All states before are the
    same to the bit."""
    table = flow_table(4, rows=rows)
    noisy, batch = rollout(policy, None, table=table)
    finished, others = rollout(policy, None, table=table, final_noise=False)
    last = batch.step_index == 3
    clean = batch.x - table.rows(batch.step_index, batch.x).noise_std * batch.model_output
    torch.testing.assert_close(finished[batch.trajectory[last]], clean[last], rtol=1e-6, atol=1e-6)
    assert torch.equal(others.x_next[last], finished[batch.trajectory[last]])
    assert torch.equal(others.x, batch.x) and torch.equal(others.x_next[~last], batch.x_next[~last])
    assert (noisy - finished).std().item() == pytest.approx(0.02, rel=0.1)  # 1280 values: their spread is known to 2%


@pytest.mark.parametrize(
    "table",
    [TABLE, TABLE.with_min_sigma(0.3), flow_table(4, 0.7, rows="flow-sde"), flow_table(4, 0.3, rows="dance"), flow_table(4, end=0.01)],
    ids=["ddim", "bound", "flow-sde", "dance", "end"],
)  # fmt: skip
def test_noise_that_is_the_sampler_s_own_stays(policy, table):
    finished, _ = rollout(policy, None, table=table)
    assert torch.equal(rollout(policy, None, table=table, final_noise=False)[0], finished)


def test_seeds_fix_the_samples(policy):
    finished, _ = rollout(policy, 5)
    again, _ = rollout(policy, 5)
    assert torch.equal(finished, again)
    others, _ = rollout(policy, 5, [*SEEDS[:4], 123])
    assert torch.equal(others[:4], finished[:4])
    assert not torch.equal(others[4], finished[4])


def test_no_graph_and_progress(policy):
    advanced = []
    finished = sample(policy, TABLE, PROMPT, SEEDS, SHAPE, batch=2, on_step=advanced.append)
    assert not finished.requires_grad
    assert finished.dtype == torch.float32
    assert advanced == [2] * 8 + [1] * 4


def test_noise_of_a_trajectory_is_its_own():
    together = TrajectoryNoise(SEEDS, SHAPE, "cpu")
    alone = TrajectoryNoise(SEEDS[3:4], SHAPE, "cpu")
    for _ in range(3):
        assert torch.equal(together.draw()[3:4], alone.draw())


def test_seeds():
    """Different for every (seed, stream, numbers), of any count and size."""
    seeds, keys = (0, 1, 2**32), ((), (0,), (1,), (0, 0), (0, 1))
    numbers = [seed_of(seed, stream, *key) for seed in seeds for stream in STREAMS for key in keys]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 2**63 for number in numbers)
    first, again = (torch.randn(3, generator=generator_of(5, "draws", 2)) for _ in range(2))
    assert torch.equal(first, again)
