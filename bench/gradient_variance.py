"""Measures what an update's gradients cost for their noise: ways to draw transitions, and the fraction with a reverse residual.

    python -m bench.gradient_variance [--updates 24] [--batches 32] [--reward-gradient lookahead]

On the embedded testbed, each batch is a rollout of a few trajectories whose every transition is stored. All ways learn from the
same batches, each from the transitions that it draws. An estimate that is twice as noisy needs twice the trajectories, so the
figure of merit is

    variance × U,   variance = trace of the covariance of a batch's gradient

where U counts the batch's network passes: sampling, forward and backward. It is given for the LoRA and for the flow network,
relative to the first way, with a jackknife interval (95%) over batches of the ratio.

Given a batch, a fraction's gradient has the gradient of all transitions as its mean. So its variance is that one's and the
mean squared distance between the two, which is estimated with less noise than the variance itself.
"""

import dataclasses
import math
import tempfile
from pathlib import Path

import torch
import tyro
from torch import Tensor

from bench.tables import markdown_table
from fastnabla.config.drawn_steps import drawn_steps
from fastnabla.config.presets import PRESETS
from fastnabla.config.train import TrainConfig
from fastnabla.objective.settings import RewardGradient
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.draws import DRAWS
from fastnabla.trajectories.sources import reverse_factors
from fastnabla.trajectories.transitions import LazyTransitions
from fastnabla.utils.console import command_console, quiet_libraries

WAYS = (("stratified", 1.0), ("stratified", 0.5), ("stratified", 0.25), ("uniform", 1.0), ("runs", 1.0), ("runs", 0.5))
"""`rollout.draw` and `objective.reverse_fraction`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """Gradients of one way, by batch."""

    passes: list[float]
    """U, of sampling and step."""
    gradients: dict[str, list[Tensor]]
    """By network, flat, float32."""

    def merit(self, network: str, whole: "Estimates") -> tuple[float, Tensor]:
        """Variance × U over all batches, and `[R]` without each batch in turn. `whole` are the estimates of the same draw with
        all reverse residuals, perhaps these."""
        rows = torch.stack(whole.gradients[network])
        gram = (rows @ rows.T).double()
        apart = (torch.stack(self.gradients[network]) - rows).square().sum(1).double()
        passes = torch.tensor(self.passes, dtype=torch.float64)

        def of(kept: Tensor) -> Tensor:
            return (_variance(gram, kept) + apart @ kept / kept.sum()) * (passes @ kept / kept.sum())

        keep = 1 - torch.eye(len(rows), dtype=torch.float64)
        return float(of(torch.ones_like(passes))), torch.stack([of(kept) for kept in keep])


def _variance(gram: Tensor, weights: Tensor) -> Tensor:
    """Trace of the sample covariance of the vectors with 0/1 `weights [R]`, from their Gram matrix `[R, R]`."""
    count = weights.sum()
    return (gram.diagonal() @ weights - weights @ gram @ weights / count) / (count - 1)


def ratio(of: tuple[float, Tensor], to: tuple[float, Tensor]) -> tuple[float, float]:
    """A `merit` relative to another one, and the half-width of its 95% interval, from the jackknife of its logarithm."""
    (own, own_without), (other, other_without) = of, to
    logs = (own_without / other_without).log()
    error = math.sqrt((len(logs) - 1) * logs.var(correction=0).item())
    return own / other, own / other * 1.96 * error


def drawn(trainer: Trainer, config: TrainConfig, draw: str, fraction: float, batch: int) -> LazyTransitions:
    """The transitions of the stored batch that a way draws. The buffer has the last step, then all steps, of each trajectory."""
    count, num_steps = config.rollout.trajectories, config.sampler.steps
    kept = drawn_steps(num_steps, PRESETS["testbed"][1].rollout.fraction)
    steps = DRAWS[draw](batch, 0, count, num_steps, kept)
    places = torch.arange(count)[:, None] * (num_steps + 1) + steps + 1
    places[:, 0] = torch.arange(count) * (num_steps + 1)
    rollout = dataclasses.replace(config.rollout, draw=draw)
    factors = reverse_factors(config.seed, rollout, kept, fraction)
    selection = trainer.components.buffer.select()[places.flatten()]
    return selection if factors is None else dataclasses.replace(selection, reverse_factor=factors(batch).flatten())


def estimate(
    trainer: Trainer, config: TrainConfig, batch: int
) -> dict[tuple[str, float], tuple[float, dict[str, Tensor]]]:
    """U and the gradients of each way, for one batch."""
    found, step = {}, trainer.step
    trainer.source.rollout(batch)
    for draw, fraction in WAYS:
        for parameter in step.parameters:
            parameter.grad = None
        step.reuse_passes = draw == "runs"
        report = step(drawn(trainer, config, draw, fraction, batch))
        sampling = config.rollout.trajectories * config.sampler.steps
        passes = sampling + sum(report.passes[kind] * count for kind, count in report.counts.items())
        groups = {"LoRA": trainer.policy.trainable(), "flow": step.flow_parameters}
        gradients = {name: torch.cat([p.grad.flatten() for p in group]) for name, group in groups.items()}
        found[draw, fraction] = passes, gradients
    trainer.components.buffer.clear()
    return found


def trained(config: TrainConfig, updates: int) -> Trainer:
    """A trainer of `config` whose networks the testbed's preset has trained for `updates` updates."""
    trainer = Trainer.from_config(config)
    if updates:
        evaluation = dataclasses.replace(config.evaluation, every=0)
        rollout = dataclasses.replace(PRESETS["testbed"][1].rollout, trajectories=16)
        other = Trainer.from_config(
            dataclasses.replace(config, updates=updates, rollout=rollout, evaluation=evaluation)
        )
        with tempfile.TemporaryDirectory() as folder:
            other.train(Path(folder))
        with torch.no_grad():
            for own, its in zip(trainer.step.parameters, other.step.parameters, strict=True):
                own.copy_(its)
    return trainer


def main(
    updates: int = 0, batches: int = 32, trajectories: int = 8, reward_gradient: RewardGradient = "terminal"
) -> None:
    """Print the table.

    Args:
        updates: of the testbed's preset, with 16 trajectories each, before measuring. 0: the pretrained policy.
        batches: independent rollouts, at least 3.
        trajectories: of each.
        reward_gradient: as `objective.reward_gradient`.
    """
    quiet_libraries()
    preset = PRESETS["testbed"][1]
    config = dataclasses.replace(
        preset,
        objective=dataclasses.replace(preset.objective, reward_gradient=reward_gradient),
        rollout=dataclasses.replace(preset.rollout, trajectories=trajectories, fraction=1.0, draw="stratified"),
    )
    trainer, console = trained(config, updates), command_console()
    ways = {way: Estimates(passes=[], gradients={"LoRA": [], "flow": []}) for way in WAYS}
    for batch in range(batches):
        for way, (passes, gradients) in estimate(trainer, config, batch).items():
            ways[way].passes.append(passes)
            for name, gradient in gradients.items():
                ways[way].gradients[name].append(gradient)
        console.print(f"batch {batch + 1} of {batches}")
    first = ways[WAYS[0]]
    lines = []
    for (draw, fraction), estimates in ways.items():
        whole = ways[draw, 1.0]
        ratios = [ratio(estimates.merit(name, whole), first.merit(name, first)) for name in ("LoRA", "flow")]
        each = sum(estimates.passes) / (batches * trajectories)
        cells = (f"{value:.2f} ± {half:.2f}" for value, half in ratios)
        lines.append((draw, f"{fraction:g}", f"{each:.1f}", *cells))
    header = ("rollout.draw", "reverse_fraction", "U a trajectory", "LoRA: variance × U", "flow: variance × U")
    print("\n".join(markdown_table(header, lines)))


if __name__ == "__main__":
    tyro.cli(main)
