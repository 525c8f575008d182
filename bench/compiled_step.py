"""Times the compiled training step against the eager one, at one static size:
`python -m bench.compiled_step {blocks,whole}`.

The step has the 6 m transitions of m trajectories, so that every micro-batch has m and each graph is compiled once.
`bench.agreement.verdict` compares the gradients. If they are wrong, the row says so and has no speed-up. A dry run traces the
graphs and their backward passes but generates no code, which would take minutes on a CPU.
"""

import argparse
import dataclasses
import functools
import statistics

import torch

from bench import rows
from bench.agreement import copied_gradients, network_pass, verdict
from bench.measure import peak_and_seconds, seconds
from bench.models import MODELS
from bench.variants import Variant, full
from bench.workload import DRAWN, Workload


class Measured:
    """The gradients and times of a variant's step at a micro-batch."""

    def __init__(self, workload: Workload, variant: Variant, transitions: int, size: int) -> None:
        self.device, self.compiled = workload.device, variant.compile != "none"
        self.run, _, policy = workload.step(variant, transitions, size)
        self.first = seconds(self.run)
        self.gradients = copied_gradients([*policy.trainable(), *workload.flow.parameters()])
        self.transitions, self.times = transitions, []

    def time(self, rounds: int = 2) -> dict[str, float | None]:
        """Cells of the row, from as many rounds as there is time for, at least one."""
        for _ in range(rounds):
            if self.times and rows.time_left() < 1.2 * self.times[-1]:
                break
            peak, elapsed = peak_and_seconds(self.run, self.device, self.compiled)
            self.times.append(elapsed)
        median = statistics.median(self.times)
        numbers = {"s": median, "fastest s": min(self.times), "slowest s": max(self.times), "rounds": len(self.times)}
        return numbers | {"transitions/s": self.transitions / median, "peak GiB": peak, "first s": self.first}


def main(arguments: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("blocks", "whole"), help="what to compile")
    parser.add_argument("--model", choices=MODELS, default="sd15" if cuda and not rows.is_dry() else "toy")
    parser.add_argument("--micro-batch", type=int, help="transitions in a network pass, m")
    options = parser.parse_args(arguments)
    model, device = MODELS[options.model](), torch.device("cuda" if cuda else "cpu")
    size = options.micro_batch or max(2, model.micro_batch // 2)
    torch._dynamo.config.automatic_dynamic_shapes = False
    if rows.is_dry():
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    workload = Workload(model, model.pixels, device, torch.bfloat16 if cuda else torch.float32)
    variant = full(cuda)

    eager = Measured(workload, variant, DRAWN * size, size)
    times = eager.time()
    rows.add("compiled", f"eager, for {options.how}", **{"micro-batch": size}, **times)
    # If compiling does not finish in time, this row remains.
    rows.add("compiled", options.how, note=f"compiling, not finished; {rows.time_left():.0f} s were left")
    other = dataclasses.replace(variant, compile=options.how)
    compiled = Measured(workload, other, DRAWN * size, size)
    batch = workload.transitions(DRAWN * size, variant.draw, size)[:size]
    passes = [
        network_pass(workload, *of)
        for of in ((other, batch, size), (variant, batch, size), (variant, batch, size // 2))
    ]
    gradients = verdict(compiled.gradients, eager.gradients, *passes)
    found = {"micro-batch": size, **compiled.time(), **gradients, "graphs": graphs()}
    found["compilation s"] = compiled.first - found["s"]
    if gradients["gradients"] == "agree":
        found["speed-up"] = times["s"] / found["s"]
    else:
        found["note"] = gradients["gradients"]
    rows.add("compiled", options.how, **found)
    if gradients["gradients"] != "agree":
        raise SystemExit(f"compile = {options.how}: gradients {gradients['gradients']}")


def graphs() -> int:
    """Number of graphs that torch.compile has built in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    main()
