"""The loss for other training loops, against its definition in float64 and the reference implementation."""

import functools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal

from fastnabla.losses import STATISTICS, residual_db_loss, reverse_scores
from tests.checks import BACKENDS, assert_gradients, ddim, ddim_table, flow_table, randn
from tests.exact import gamma_of, guided
from tests.golden import ALL_STEP_SETS, GoldenStep, load_step
from tests.loss_arguments import SHAPE, STEPS, arguments, random, reverse_arguments

EXACT = {"rtol": 1e-9, "atol": 1e-12}
load_once = functools.cache(load_step)


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
    with pytest.raises(ValueError, match=r"x_t requires no gradient: call x_t\.requires_grad_\(\)"):
        reverse_scores(held["noise_pred"], held["x_t"], **sampler)
    held["x_t"].requires_grad_()
    for without in (held["noise_pred"] * 1, held["noise_pred"].detach()):
        with pytest.raises(ValueError, match="noise_pred has no graph to x_t"):
            reverse_scores(without, held["x_t"], **sampler)


def test_reverse_scores_without_gradients_enabled():
    held = arguments(None)
    x = held["x_t"].requires_grad_()
    output = x.sin()
    sampler = {"guidance_scale": None, **{name: held[name] for name in ("x_next", "timesteps", "scheduler")}}
    expected = reverse_scores(output, x, **sampler)
    with torch.no_grad():
        assert torch.equal(reverse_scores(output, x, **sampler), expected)


def test_the_optimum_is_the_tilted_policy():
    """The loss is quadratic in the output: one Newton step leads to ``o_ref + (σ²/b) βγ'∇r(x')``, in mixed rows."""
    held = arguments(None)
    result = residual_db_loss(**held, guidance_scale=None, beta=2.0)
    (gradient,) = torch.autograd.grad(result.loss, held["noise_pred"])
    rows = ddim_table().rows(STEPS, held["x_t"])
    curvature = 2 * (rows.b / rows.sigma**2) ** 2 / gradient.numel()
    optimum = held["noise_pred_ref"] + rows.sigma**2 / rows.b * 2.0 * rows.alpha_bar_next * held["reward_score_next"]
    torch.testing.assert_close(held["noise_pred"] - gradient / curvature, optimum, **EXACT)
