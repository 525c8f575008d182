"""Measures how far quantised weights move an embedded model's outputs and gradients from those with the weights as they are.

    python -m bench.quantised_gradients [--preset testbed-flow]

Rollouts, LoRA and g_φ are the same for all kinds. The LoRA is not new: normal numbers are added to its matrices.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import tyro
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bench.agreement import distance
from bench.tables import markdown_table
from fastnabla.config.presets import PRESETS
from fastnabla.config.train import TrainConfig
from fastnabla.methods.micro_batches import MicroBatch, cut
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.methods.reward_scores import unshared_scores
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.transitions import LazyTransitions
from fastnabla.utils.console import quiet_libraries

KINDS = ("none", "int8", "nf4")
LORA_NOISE = 0.02
"""Standard deviation of what is added to the LoRA's matrices."""
Measured = dict[str, Tensor]


def trainer_of(config: TrainConfig, kind: str) -> Trainer:
    """A trainer with weights of a `kind`, whose LoRA is not new."""
    trainer = Trainer.from_config(dataclasses.replace(config, model=dataclasses.replace(config.model, quantise=kind)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.policy.trainable():
            parameter += LORA_NOISE * torch.randn(parameter.shape, generator=generator)
    return trainer


def measure(trainer: Trainer, selection: LazyTransitions) -> Measured:
    """What is compared: tensors of one row by state, and flat gradients."""
    step: BalanceStep = trainer.step
    found: dict[str, list[Tensor]] = {"output": [], "vjp": [], "score": []}
    for part in cut(selection, len(trainer.table), torch.arange(len(selection)), step.micro_batch):
        if part.last:
            continue
        for name, rows in _of_states(trainer, part).items():
            found[name].append(rows.flatten(1))
    measured = {name: torch.cat(rows) for name, rows in found.items()}
    for reward_gradient in ("terminal", "lookahead"):
        step.objective = dataclasses.replace(step.objective, reward_gradient=reward_gradient)
        for parameter in step.parameters:
            parameter.grad = None
        step(selection)
        measured[reward_gradient] = torch.cat([p.grad.flatten() for p in trainer.policy.trainable()])[None]
    return measured


def _of_states(trainer: Trainer, part: MicroBatch) -> Measured:
    """Output pairs at the states x, a vector-Jacobian product with a seeded vector, and the look-ahead scores ∇r(x')."""
    policy, step, batch = trainer.policy, trainer.step, part.gather()
    x = batch.x.detach().requires_grad_()
    output = policy(x, trainer.table.rows(batch.step_index, batch.x).timestep, batch.prompt)
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(output.shape, generator=generator)
    (vjp,) = torch.autograd.grad(output, x, vector)

    def pixel_gradient(latents: Tensor, prompts: Sequence[int]) -> Tensor:
        return step.decoder.reward_gradient(latents, [step.prompts[i] for i in prompts], step.reward)[1]

    score = unshared_scores(policy, pixel_gradient, part, batch, trainer.table, through_network=True)
    return {"output": torch.cat(output.detach().chunk(len(output) // len(x)), 1), "vjp": vjp, "score": score}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return distance([actual], [expected])


def cosine(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], float]:
    return lambda actual, expected: reduce(cosine_similarity(actual, expected, 1)).item()


ROWS: tuple[tuple[str, str, Callable[[Tensor, Tensor], float]], ...] = (
    ("outputs, relative error", "output", relative_error),
    ("vector-Jacobian product, relative error", "vjp", relative_error),
    ("look-ahead gradient of a state, cosine: median", "score", cosine(torch.median)),
    ("look-ahead gradient of a state, cosine: lowest", "score", cosine(torch.min)),
    ("LoRA's gradient of a step, cosine: terminal", "terminal", cosine(torch.min)),
    ("LoRA's gradient of a step, cosine: look-ahead", "lookahead", cosine(torch.min)),
)


def compare(config: TrainConfig) -> dict[str, dict[str, float]]:
    """By kind, the figures of `ROWS` against unquantised weights."""
    measured: dict[str, Measured] = {}
    selection = None
    for kind in KINDS:
        trainer = trainer_of(config, kind)
        if selection is None:
            trainer.source.rollout(0)
            selection = trainer.components.buffer.select()
        measured[kind] = measure(trainer, selection)
    return {
        kind: {label: of(measured[kind][name], measured["none"][name]) for label, name, of in ROWS}
        for kind in KINDS
        if kind != "none"
    }


def main(preset: str = "testbed", trajectories: int = 8) -> None:
    """Print the table.

    Args:
        preset: of an embedded model.
        trajectories: of the rollout.
    """
    quiet_libraries()
    config = PRESETS[preset][1]
    found = compare(dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, trajectories=trajectories)))
    lines = [(label, *(f"{found[kind][label]:.3f}" for kind in found)) for label, *_ in ROWS]
    print("\n".join(markdown_table((preset, *found), lines)))


if __name__ == "__main__":
    tyro.cli(main)
