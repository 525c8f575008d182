"""A wrong argument of the loss is refused with its name, value and what was expected; and what importing the loss takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnabla
from fastnabla.losses import residual_db_loss
from tests.checks import ddim
from tests.loss_arguments import SHAPE, arguments, random

WRONG = {
    "pair": ({"noise_pred": random(1)}, r"noise_pred has shape \(4, 2, 3, 5\), expected \(8, 2, 3, 5\) \(pairs"),
    "reference_shape": ({"noise_pred_ref": random(1)[:3]}, r"noise_pred_ref has shape \(3, 2, 3, 5\), expected \(8, "),
    "single": (
        {"guidance_scale": None},
        r"noise_pred has shape \(8, 2, 3, 5\), expected \(4, .*one row per transition",
    ),
    "x_next": ({"x_next": random(1)[:, :1]}, r"x_next has shape \(4, 1, 3, 5\), expected \(4, 2, 3, 5\)"),
    "empty": ({"x_t": torch.zeros(0, 2)}, r"x_t has shape \(0, 2\), expected \[N, …\] with N ≥ 1"),
    "integer_state": ({"x_t": torch.zeros(SHAPE, dtype=torch.int64)}, "x_t has dtype torch.int64, expected a floating"),
    "reward": ({"reward_score_next": random(1)[0]}, r"reward_score_next has shape \(2, 3, 5\), expected"),
    "reward_device": ({"reward_score_next": random(1).to("meta")}, "reward_score_next is on meta, expected cpu"),
    "flow": ({"flow_score_next": random(1).long()}, "flow_score_next has dtype torch.int64, expected a floating-point"),
    "old": ({"noise_pred_old": random(1, copies=2)}, r"noise_pred_old has shape \(8, .* expected \(4, "),
    "timestep_shape": (
        {"timesteps": torch.tensor(901)},
        r"timesteps is torch.int64 \(\) on cpu, expected torch.int64, torch.float32 or torch.float64 \(4,\)",
    ),
    "timestep_dtype": (
        {"timesteps": torch.tensor([901.0] * 4, dtype=torch.bfloat16)},
        "timesteps is torch.bfloat16 .* expected torch.int64",
    ),
    "timestep": ({"timesteps": torch.tensor([901, 1, 2, 1])}, "timestep 2 is not one of the sampler's 10"),
    "scheduler": ({"scheduler": object()}, "scheduler object is not supported"),
    "no_timesteps": ({"scheduler": ddim()}, r"call scheduler\.set_timesteps"),
    "table_eta": ({"eta": 0.5}, r"eta = 0\.5: expected None with a TransitionTable"),
    "eta": ({"eta": 0.0, "scheduler": ddim(10)}, r"eta = 0\.0: must be positive"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale = nan: expected a finite number"),
    "beta": ({"beta": float("inf")}, "beta = inf: expected a finite number, not negative"),
    "prior_weight": ({"prior_weight": -0.5}, r"prior_weight = -0\.5: expected"),
    "trust_region_weight": ({"trust_region_weight": float("nan")}, "trust_region_weight = nan: expected"),
    "reverse_weight": ({"reverse_weight": -1.0}, r"reverse_weight = -1\.0: expected"),
    "gamma": ({"gamma": "alpha"}, r"gamma = 'alpha': expected one of \('alpha_bar', "),
    "weighting": ({"weighting": "snr"}, r"weighting = 'snr': expected one of \('score', 'sigma'\)"),
    "reverse_term": (
        {"score_reverse": random(1), "flow_score": random(1)},
        "score_ref_reverse, reward_score = None: the reverse term needs all of score_reverse, ",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        residual_db_loss(**{**arguments(5.0), "guidance_scale": 5.0, "beta": 3.0, **changes})


@pytest.mark.slow
def test_needs_torch_alone():
    """Neither a model library nor the trainer is imported with the loss."""
    heavy = (
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "fastnabla.models.policy",
        "fastnabla.methods.nabla_db",
        "fastnabla.training.trainer",
    )
    code = f"import sys, fastnabla.losses; print([name for name in {heavy} if name in sys.modules])"
    root = Path(fastnabla.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
