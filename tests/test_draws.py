import pytest
import torch

from fastnabla.draws import draw_stratified, draw_uniform

NUM_STEPS = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_stratified_draws():
    steps = draw_stratified(4000, NUM_STEPS, 4, generator())
    assert steps.dtype == torch.int64
    assert steps.shape == (4000, 5)
    assert (steps[:, 0] == NUM_STEPS - 1).all()
    assert torch.equal(steps[:, 1:] // 2, torch.arange(4).expand(4000, 4))
    # 4000 draws of each of 2 steps: a share of 0.5 with a standard deviation of 0.008; 0.04 is five of them.
    shares = steps[:, 1:].flatten().bincount(minlength=NUM_STEPS) / 4000
    assert (shares - 0.5).abs().max() < 0.04


def test_uniform_draws():
    steps = draw_uniform(4000, NUM_STEPS, 3, generator())
    assert steps.shape == (4000, 4)
    assert (steps[:, 0] == NUM_STEPS - 1).all()
    assert (steps.sort(1).values.diff(dim=1) > 0).all(), "a step was drawn twice"
    # 7 steps before the last, each in with probability 3/7, standard deviation 0.008.
    shares = steps[:, 1:].flatten().bincount(minlength=NUM_STEPS) / 4000
    assert (shares[:-1] - 3 / 7).abs().max() < 0.04
    assert shares[-1] == 0


@pytest.mark.parametrize("strata", [0, -2, 3, 16])
def test_strata_must_divide_the_steps(strata):
    with pytest.raises(ValueError, match=f"strata = {strata}: must be at least 1 and divide the number of steps, 8"):
        draw_stratified(2, NUM_STEPS, strata, generator())


@pytest.mark.parametrize("draws", [0, 8])
def test_uniform_draws_must_fit(draws):
    with pytest.raises(ValueError, match=f"draws = {draws}: must be between 1 and 7"):
        draw_uniform(2, NUM_STEPS, draws, generator())


@pytest.mark.parametrize("draw", [draw_stratified, draw_uniform])
def test_draws_are_reproducible(draw):
    assert torch.equal(draw(9, NUM_STEPS, 4, generator(1)), draw(9, NUM_STEPS, 4, generator(1)))
    assert not torch.equal(draw(9, NUM_STEPS, 4, generator(1)), draw(9, NUM_STEPS, 4, generator(2)))
