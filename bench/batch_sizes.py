"""Times steps at micro-batch 4, 8 and 16 and a rollout at 16, and measures bfloat16's rounding floor:
`python -m bench.batch_sizes`.

A step at micro-batch m has the 6 m transitions of m trajectories, so that every micro-batch is full.

The rounding floor: κ ‖o_θ − o_old‖² should be 0 in the first update, since the policy has not changed since the rollout. But
o_old comes from the rollout's pass, over 16 trajectories without a graph, and o_θ from the step's, at the micro-batch. The
shapes differ, so the kernels and their rounding differ too.
"""

import argparse

import torch
from torch import Tensor

from bench import rows
from bench.figures import MICRO_BATCHES
from bench.measure import peak_and_seconds
from bench.models import MODELS
from bench.rollout import rollout
from bench.variants import Variant, full
from bench.workload import DRAWN, Workload
from fastnabla.models.policy import Policy
from fastnabla.objective.gaussian import guide

ROLLOUT = 16
KAPPA = 1000.0
"""κ of the authors' default configuration."""


def rounding_floor(policy: Policy, x: Tensor, timestep: Tensor, prompt: Tensor, size: int) -> dict[str, float]:
    """The difference between guided outputs at micro-batch `size` with a graph, and of all rows at once without one."""

    def outputs(part: slice) -> Tensor:
        output = policy(x[part], timestep[part], prompt[part])
        return guide(output, policy.guidance_scale).detach().float()

    with torch.no_grad():
        old = outputs(slice(None))
    new = torch.cat([outputs(slice(i, i + size)) for i in range(0, len(x), size)])
    found = (new - old).square().mean().item()
    return {"mean square": found, "of it": KAPPA * found, "relative": (found / old.square().mean().item()) ** 0.5}


def add_step(workload: Workload, variant: Variant, size: int) -> None:
    """Add the row of a step at a micro-batch: its first run, replaced by a second one if there is time."""
    run, *_ = workload.step(variant, DRAWN * size, size)
    for note in ({"note": "the first step"}, {}):
        peak, elapsed = peak_and_seconds(run, workload.device)
        found = {"transitions": DRAWN * size, "s": elapsed, "transitions/s": DRAWN * size / elapsed, "peak GiB": peak}
        rows.add("micro-batch", f"micro-batch {size}", **found, **note)
        if rows.time_left() < 1.2 * elapsed:
            return


def main(arguments: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd15" if cuda and not rows.is_dry() else "toy")
    options = parser.parse_args(arguments)
    model, device, variant = MODELS[options.model](), torch.device("cuda" if cuda else "cpu"), full(cuda)
    workload = Workload(model, model.pixels, device, torch.bfloat16)
    policy = workload.policy(variant)
    states = workload.transitions(DRAWN * ROLLOUT, "stratified", ROLLOUT)[:ROLLOUT]
    timestep = workload.table.rows(states.step_index, states.x).timestep
    for size in MICRO_BATCHES:
        floor = rounding_floor(policy, states.x, timestep, states.prompt, size)
        rows.add("rounding", f"micro-batch {size}", **floor)
    for size in MICRO_BATCHES:
        try:
            add_step(workload, variant, size)
        except torch.OutOfMemoryError as error:
            rows.add("micro-batch", f"micro-batch {size}", note=str(error).splitlines()[0])
    rows.add("rollout", f"batch {ROLLOUT}", **rollout(workload, variant, ROLLOUT))


if __name__ == "__main__":
    main()
