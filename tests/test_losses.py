"""The loss for other training loops, against its definition in float64 and the reference implementation."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode

import fastnabla
from fastnabla import transition
from fastnabla.losses import STATISTICS, residual_db_loss, reverse_scores
from fastnabla.transition import TransitionTable, table_of
from tests.checks import BACKENDS, assert_gradients, ddim, ddim_table, flow_table, randn
from tests.exact import gamma_of, guided
from tests.golden import ALL_STEP_SETS, GoldenStep, load_step

SHAPE = (4, 2, 3, 5)
STEPS = torch.tensor([9, 0, 5, 9])  # the first and the last row are last transitions of 10
EXACT = {"rtol": 1e-9, "atol": 1e-12}
load_once = functools.cache(load_step)


def random(seed: int, dtype: torch.dtype = torch.float64, copies: int = 1) -> Tensor:
    return randn(copies * SHAPE[0], *SHAPE[1:], seed=seed, dtype=dtype)


def arguments(
    guidance: float | None, dtype: torch.dtype = torch.float64, table: TransitionTable | None = None
) -> dict[str, Any]:
    """What a user holds, without flow, trust region and reverse term; the sampler is DDIM's unless another `table` is given."""
    copies, table = 1 if guidance is None else 2, table or ddim_table()
    x = random(0, dtype)
    rows = table.rows(STEPS, x)
    return {
        "noise_pred": random(1, dtype, copies).requires_grad_(),
        "noise_pred_ref": random(2, dtype, copies),
        "x_t": x,
        "x_next": rows.a * x + rows.b * random(3, dtype) + rows.sigma * random(4, dtype),
        "timesteps": rows.timestep,
        "scheduler": table,
        "reward_score_next": random(5, dtype),
    }


def reverse_arguments(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    names = ("score_reverse", "score_ref_reverse", "reward_score", "flow_score")
    values = {name: random(10 + seed, dtype) for seed, name in enumerate(names)}
    values["flow_score"].requires_grad_()
    return values


def naive_loss(
    held: dict, *, guidance_scale, beta, gamma, prior_weight, weighting, reverse_weight, trust_region_weight
) -> Tensor:
    """One row at a time: scores by autograd of log-densities, terms by the definition."""
    table, total = held["scheduler"], 0
    outputs, outputs_ref = (guided(held[name], guidance_scale) for name in ("noise_pred", "noise_pred_ref"))
    for row, i in enumerate(STEPS):
        x, x_next, last = held["x_t"][row], held["x_next"][row].clone().requires_grad_(), i == 9
        o, o_ref = outputs[row], outputs_ref[row]
        s, s_ref = (
            torch.autograd.grad(
                Normal(table.a[i] * x + table.b[i] * out, table.sigma[i]).log_prob(x_next).sum(),
                x_next,
                create_graph=True,
            )[0]
            for out in (o, o_ref)
        )
        unit = table.sigma[i] if weighting == "sigma" else 1.0
        forward = (
            s - prior_weight * s_ref - beta * gamma_of(table.alpha_bar_next[i], gamma) * held["reward_score_next"][row]
        )
        if held.get("flow_score_next") is not None:
            g_next = held["flow_score_next"][row]
            if last:
                total = total + (unit * g_next).square().mean()
            else:
                forward = forward - g_next
        if held.get("flow_score") is not None and not last:
            backward = (
                prior_weight * (held["score_reverse"][row] - held["score_ref_reverse"][row]) + held["flow_score"][row]
            )
            backward = backward + beta * gamma_of(table.alpha_bar[i], gamma) * held["reward_score"][row]
            total = total + reverse_weight * (unit * backward).square().mean()
        total = total + (unit * forward).square().mean()
        if held.get("noise_pred_old") is not None:
            total = total + trust_region_weight * (o - held["noise_pred_old"][row]).square().mean()
    return total / SHAPE[0]


@pytest.mark.parametrize("extras", ["bare", "old", "flow", "flow-old-reverse"])
@pytest.mark.parametrize("trust_region", [0.0, 2.5])
@pytest.mark.parametrize("weighting", ["score", "sigma"])
@pytest.mark.parametrize("guidance", [None, 5.0])
@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
def test_agrees_with_the_definition(prior_weight, guidance, weighting, trust_region, extras):
    """Loss and gradients in float64; one batch mixes inner and last rows."""
    held = arguments(guidance)
    if "flow" in extras:
        held["flow_score_next"] = random(6).requires_grad_()
    if "old" in extras:
        held["noise_pred_old"] = random(7)
    if "reverse" in extras:
        held |= reverse_arguments()
    settings = {
        "guidance_scale": guidance,
        "beta": 3.0,
        "gamma": "sqrt_alpha_bar" if "old" in extras else "alpha_bar",
        "prior_weight": prior_weight,
        "weighting": weighting,
        "reverse_weight": 0.7,
        "trust_region_weight": trust_region,
    }
    result = residual_db_loss(**held, **settings)
    expected = naive_loss(held, **settings)
    torch.testing.assert_close(result.loss, expected, **EXACT)
    inputs = [value for value in held.values() if isinstance(value, Tensor) and value.requires_grad]
    actual, expected = torch.autograd.grad(result.loss, inputs), torch.autograd.grad(expected, inputs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)

    parts = result.forward + 0.7 * result.reverse + result.terminal + trust_region * result.trust_region
    torch.testing.assert_close(parts.mean(), result.loss.detach(), **EXACT)
    last = STEPS == 9
    assert not result.reverse[last].any()
    assert not result.terminal[~last].any()
    assert set(result.statistics) == set(STATISTICS)
    assert all(value.shape == (4,) for value in result.statistics.values())
    details = [result.forward, result.reverse, result.terminal, result.trust_region, *result.statistics.values()]
    assert not any(value.requires_grad for value in details)


@pytest.mark.parametrize("rows", ["ddim", "flow-sde", "dance", "cps"])
def test_agrees_with_the_definition_in_flows(rows):
    """With a velocity network's rows, and its timesteps in float32, as the scheduler has them."""
    table = flow_table(eta=0.6, rows=rows)
    held = arguments(5.0, table=table) | reverse_arguments()
    held |= {"flow_score_next": random(6).requires_grad_(), "noise_pred_old": random(7)}
    assert held["timesteps"].dtype == torch.float32 and held["timesteps"][2] == table.timestep[5]
    settings = {"guidance_scale": 5.0, "beta": 3.0, "gamma": "alpha_bar", "prior_weight": 0.5, "weighting": "sigma"}
    settings |= {"reverse_weight": 0.7, "trust_region_weight": 2.5}
    result, expected = residual_db_loss(**held, **settings).loss, naive_loss(held, **settings)
    torch.testing.assert_close(result, expected, **EXACT)
    inputs = [value for value in held.values() if isinstance(value, Tensor) and value.requires_grad]
    for one, other in zip(*(torch.autograd.grad(loss, inputs) for loss in (result, expected)), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flow_scheduler_is_one_of_ddpm_rows(backend):
    """Float32 tensors and a scheduler of diffusers after `set_timesteps`, against float64 and the table: to 1e-5, of float32
    coefficients and sums of 30 elements."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    table = flow_table()
    held = arguments(5.0, torch.float32, table) | reverse_arguments(torch.float32)
    settings = {"guidance_scale": 5.0, "beta": 3.0, "weighting": "sigma"}
    timesteps = scheduler.timesteps[STEPS]
    found = residual_db_loss(
        **held | {"scheduler": scheduler, "timesteps": timesteps}, **settings, backend=backend
    ).loss
    others = {name: held.pop(name) for name in ("timesteps", "scheduler")}
    exact = residual_db_loss(**{name: value.double() for name, value in held.items()}, **others, **settings).loss
    assert exact.dtype == torch.float64
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found, held["noise_pred"])
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_no_gradient_to_targets_and_states():
    held = arguments(5.0) | reverse_arguments() | {"noise_pred_old": random(7)}
    fixed = [
        value.requires_grad_()
        for name, value in held.items()
        if name not in ("noise_pred", "timesteps", "scheduler", "flow_score")
    ]
    loss = residual_db_loss(**held, guidance_scale=5.0, beta=3.0, prior_weight=0.5).loss
    assert set(torch.autograd.grad(loss, fixed, allow_unused=True)) == {None}


def test_values_that_last_rows_do_not_have_are_not_read():
    """NaN where the reverse term of a last row would be, neither in the loss nor in gradients."""
    held = arguments(None) | reverse_arguments()
    for name in ("score_reverse", "score_ref_reverse", "reward_score", "flow_score"):
        held[name] = held[name].detach().clone()
        held[name][STEPS == 9] = float("nan")
    held["flow_score"].requires_grad_()
    result = residual_db_loss(**held, guidance_scale=None, beta=3.0)
    result.loss.backward()
    assert result.loss.isfinite()
    assert held["flow_score"].grad.isfinite().all()


def test_scheduler_or_table():
    held = arguments(5.0)
    for eta in (None, 0.6):
        table = residual_db_loss(**{**held, "scheduler": ddim_table(eta=eta or 1.0)}, guidance_scale=5.0, beta=3.0)
        scheduler = residual_db_loss(**{**held, "scheduler": ddim(10)}, guidance_scale=5.0, beta=3.0, eta=eta)
        assert table.loss == scheduler.loss


class Operations(TorchDispatchMode):
    """Names of the operations within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def test_a_scheduler_becomes_a_table_once(monkeypatch):
    """Until its timesteps, its configuration or η change, whatever the device; and no longer than it lives."""
    scheduler = ddim(10)
    held = arguments(5.0) | {"scheduler": scheduler}
    built, build = [], TransitionTable.from_scheduler
    monkeypatch.setattr(
        TransitionTable, "from_scheduler", lambda *args, **kwargs: built.append(1) or build(*args, **kwargs)
    )
    operations = []
    for _ in range(3):
        with Operations() as seen:
            residual_db_loss(**held, guidance_scale=5.0, beta=3.0)
        operations.append(seen.names)
    assert len(built) == 1 and len(operations[0]) > len(operations[1]) and operations[1] == operations[2]
    table = table_of(scheduler, 1.0)
    with Operations() as seen:
        assert table_of(scheduler, 1.0) is table
    assert seen.names == [] and len(built) == 1

    assert table_of(scheduler, 0.5).sigma[0] == 0.5 * table.sigma[0] and len(built) == 2
    scheduler.set_timesteps(20)
    assert len(table_of(scheduler, 0.5)) == 20 and len(built) == 3
    scheduler.timesteps += 1  # in place
    assert table_of(scheduler, 0.5).timestep[-1] == 2 and len(built) == 4
    scheduler.timesteps -= 1
    scheduler.register_to_config(prediction_type="v_prediction")
    assert table_of(scheduler, 1.0).d[0] != table.d[0] and len(built) == 5
    other = ddim(10)
    assert table_of(other, 1.0) is not table_of(ddim(10), 1.0) and len(built) == 7
    kept = len(transition._TABLES)
    del other
    assert len(transition._TABLES) == kept - 1
    with torch.inference_mode():
        scheduler.set_timesteps(10)
    assert table_of(scheduler, 1.0) is table_of(scheduler, 1.0) and len(built) == 8


def test_a_table_goes_to_a_device_in_two_copies():
    """And is not looked at there, which would wait for the device: the meta device has nothing to look at."""
    table = ddim_table()
    with Operations() as seen:
        moved = table.to("meta")
    assert seen.names.count("_to_copy") == 2
    assert {getattr(moved, field.name).dtype for field in dataclasses.fields(moved)} == {torch.float32, torch.float64}
    with Operations() as seen:
        assert table.to("meta") is moved
    assert seen.names == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(dtype):
    held = (
        arguments(5.0, torch.float32) | reverse_arguments(torch.float32) | {"flow_score_next": random(6, torch.float32)}
    )
    others = {name: held.pop(name) for name in ("timesteps", "scheduler")}
    low = {name: value.detach().to(dtype) for name, value in held.items()} | others
    low["noise_pred"].requires_grad_()
    same = {name: low[name].detach().float() for name in held} | others
    loss = residual_db_loss(**low, guidance_scale=5.0, beta=3.0).loss
    assert loss.dtype == torch.float32
    assert loss == residual_db_loss(**same, guidance_scale=5.0, beta=3.0).loss
    loss.backward()
    assert low["noise_pred"].grad.dtype == dtype


def raw_rewards(golden: GoldenStep, name: str, alpha_bar: Tensor) -> Tensor:
    """The golden βγ∇r of all slots, without βγ."""
    scaled = torch.stack(
        [golden.expected[f"{j}.{name}"] for j in range(golden.inputs["timesteps"].shape[1])], 1
    ).flatten(0, 1)
    return scaled / (golden.objective.beta * gamma_of(alpha_bar, golden.objective.gamma))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", ALL_STEP_SETS)
def test_agrees_with_the_reference(folder, backend):
    """A user's loop around the golden networks: losses to 1e-4 (see tests/methods/test_nabla_db.py), gradients of all parameters."""
    golden = load_once(folder)
    policy, batch, objective = golden.policy, golden.transitions, golden.objective
    step = golden.step(100)
    for parameter in step.parameters:
        parameter.grad = None
    rows = golden.table.rows(batch.step_index, batch.x)
    x = batch.x.clone().requires_grad_()
    noise_pred = policy(x, rows.timestep, batch.prompt)
    noise_pred_ref = policy.reference(x, rows.timestep, batch.prompt)
    sampler = (batch.x_next, rows.timestep, golden.table)
    settings = {"guidance_scale": policy.guidance_scale, "backend": backend}
    scores = {}
    if golden.flow:
        embeddings = policy.conditions.of_prompts(batch.prompt)
        scores = {
            "flow_score_next": golden.flow(batch.x_next, rows.timestep_next, embeddings),
            "score_ref_reverse": reverse_scores(noise_pred_ref, x, *sampler, **settings, retain_graph=False),
            "score_reverse": reverse_scores(noise_pred, x, *sampler, **settings),
            "reward_score": raw_rewards(golden, "reward_score", rows.alpha_bar),
            "flow_score": golden.flow(batch.x, rows.timestep, embeddings),
        }
    result = residual_db_loss(
        noise_pred,
        noise_pred_ref,
        x,
        *sampler,
        raw_rewards(golden, "reward_score_next", rows.alpha_bar_next),
        noise_pred_old=batch.model_output,
        beta=objective.beta,
        gamma=objective.gamma,
        prior_weight=objective.prior_weight,
        reverse_weight=objective.reverse_weight,
        trust_region_weight=objective.trust_region_weight,
        **settings,
        **scores,
    )
    result.loss.backward(inputs=step.parameters)
    gradients = {name: gradient.clone() for name, gradient in golden.gradients().items()}
    assert_gradients(gradients, {name: g for name, g in golden.expected.items() if name.startswith("grad.")})
    for j in range(golden.inputs["timesteps"].shape[1]):
        expected = golden.expected[f"{j}.loss_forward"]
        torch.testing.assert_close(
            result.forward.view(golden.meta["batch_size"], -1)[:, j], expected, rtol=1e-4, atol=1e-6
        )

    for parameter in step.parameters:
        parameter.grad = None
    report = step(batch)
    torch.testing.assert_close(result.loss.detach(), report.losses["loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("guidance", [None, 5.0])
def test_reverse_scores(guidance):
    table, copies = ddim_table(eta=0.8), 1 if guidance is None else 2
    x = random(0).requires_grad_()
    x_next = random(1)
    weight = randn(30, 30, seed=2, dtype=torch.float64)
    output = (torch.cat([x] * copies).flatten(1) @ weight).sin().view(-1, *SHAPE[1:])
    o = output if guidance is None else torch.lerp(*output.chunk(2), guidance)
    timesteps = table.timestep[STEPS]
    actual = reverse_scores(output, x, x_next, timesteps, table, guidance_scale=guidance)
    a, b, sigma = (column[STEPS, None, None, None] for column in (table.a, table.b, table.sigma))
    (expected,) = torch.autograd.grad(Normal(a * x + b * o, sigma).log_prob(x_next).sum(), x, retain_graph=True)
    torch.testing.assert_close(actual, expected, **EXACT)
    scheduler = reverse_scores(
        output, x, x_next, timesteps, ddim(10), guidance_scale=guidance, eta=0.8, retain_graph=False
    )
    assert torch.equal(actual, scheduler)
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


def test_reverse_scores_need_a_graph():
    held = arguments(5.0)
    sampler = {"guidance_scale": 5.0, **{name: held[name] for name in ("x_next", "timesteps", "scheduler")}}
    with pytest.raises(ValueError, match="noise_pred has no graph to x_t"):
        reverse_scores(held["noise_pred"], held["x_t"], **sampler)
    with pytest.raises(ValueError, match="noise_pred has no graph to x_t"):
        reverse_scores(held["noise_pred"] * 1, held["x_t"].requires_grad_(), **sampler)


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


def test_the_optimum_is_the_tilted_policy():
    """The loss is quadratic in the output: one Newton step leads to ``o_ref + (σ²/b) βγ'∇r(x')``, in mixed rows."""
    held = arguments(None)
    result = residual_db_loss(**held, guidance_scale=None, beta=2.0)
    (gradient,) = torch.autograd.grad(result.loss, held["noise_pred"])
    rows = ddim_table().rows(STEPS, held["x_t"])
    curvature = 2 * (rows.b / rows.sigma**2) ** 2 / gradient.numel()
    optimum = held["noise_pred_ref"] + rows.sigma**2 / rows.b * 2.0 * rows.alpha_bar_next * held["reward_score_next"]
    torch.testing.assert_close(held["noise_pred"] - gradient / curvature, optimum, **EXACT)
