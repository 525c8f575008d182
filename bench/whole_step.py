"""Times a whole training step: the published algorithm against fastnabla with its optimisations.

    python -m bench.whole_step [--model sd15] [--micro-batch 16] [--transitions 48] [--budget-seconds 240]

The networks have random weights (the cost is the same), the states are random, and K of 50 DDIM steps are drawn. Each row is
measured and written before the next one starts. Afterwards all rows are measured again in turn, so that other load on the
machine affects all of them. Each row also has the difference between its gradients at toy size and the published algorithm's;
if that is too large, the row says so. A row that cannot run says why, and one that does not fit into memory has a smaller
micro-batch. Rows that there was no time for are listed. The files are `step_<model>_<hardware>_<date>.json` and `.md`, or in
a GPU run the run's files.
"""

import argparse
import datetime
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import agreement, rows
from bench.files import RESULTS, as_json, file_stem, save
from bench.measure import device_info, peak_and_seconds, seconds
from bench.models import MODELS
from bench.rollout import rollout
from bench.tables import Row, markdown_table, number
from bench.variants import ROWS, Variant, full
from bench.workload import DRAWN, STEPS, Workload
from fastnabla.cost.unit_costs import UnitCosts
from fastnabla.models.quantised_linear import weight_bytes

HEADER = (
    *("step", "s", "spread", "transitions/s", "vs published", "U", "decodes", "peak GiB", "TFLOP/s", "of matmul"),
    *("gradient difference", "note"),
)
NOTES = """\
s: median of the rounds; spread: fastest to slowest; CPU time for a single CPU thread, otherwise wall-clock time. vs published:
speed-up over the published algorithm in its faster form, median of the rounds. U and decodes (with backward): for each
transition. Peak: memory in addition to the weights. quantise:
format of the UNet's linear layers. TFLOP/s: arithmetic of these passes, the decodes and g_φ, without the
reward. Of matmul: fraction of the rate of a bfloat16 product of 8192³. Gradient difference: largest relative difference of a
tensor from the published algorithm's, on toy networks in float64 (float32 with kernels). Each row adds to the row above it;
the last rows say what they change in the row they are based on. draw=runs: adjacent transitions, which are correlated.
reverse_fraction: a drawn half has a reverse residual, so the gradients are those of the rows above in expectation.
lookahead_detached, terminal: gradients other than the paper's."""


def matmul_rate(device: torch.device) -> float | None:
    """TFLOP/s of a bfloat16 product of 8192³; None without CUDA."""
    if device.type != "cuda":
        return None
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def run() -> None:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()

    run()
    return 10 * 2 * 8192**3 / statistics.median(seconds(run) for _ in range(5)) / 1e12


class Bench:
    """Measures the variants of one model on one device within a time limit."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.deadline = time.perf_counter() + min(options.budget_seconds, rows.time_left())
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = MODELS[options.model]()
        self.pixels = options.resolution or self.model.pixels
        self.micro_batch = options.micro_batch or self.model.micro_batch
        self.transitions = options.transitions or self.model.transitions
        if self.transitions % DRAWN:
            self.transitions += DRAWN - self.transitions % DRAWN
        self.workload = Workload(self.model, self.pixels, self.device, self.dtype)
        self.costs, self.ceiling = self.workload.costs(), matmul_rate(self.device)
        self.not_run: list[str] = []

    def time_left(self) -> float:
        return self.deadline - time.perf_counter()

    def table(self, group: list[Variant], rounds: int, publish: Callable[[list[Row]], None]) -> None:
        """Measure the variants of `group`, the published algorithm first. `publish` is called with all rows whenever one
        changes."""
        table: list[Row] = []
        timed: list[tuple[Row, Callable[[], None], list[float]]] = []
        slowest = 0.0
        # The first round prepares the rows and checks their gradients.
        for variant in group:
            if self.time_left() < max(0.0, 1.5 * slowest):
                self.not_run.append(variant.name)
                continue
            begun, row = time.perf_counter(), {"name": variant.name}
            table.append(row)
            try:
                run = self.prepare(variant, row)
                row["peak GiB"], once = peak_and_seconds(run, self.device, variant.compile != "none")
                timed.append((row, run, [once]))
                self.finish(timed)
                publish(table)
                row |= agreement.check(variant, self.device)
            except Exception as error:  # out of memory, a missing package or compiler: go on with the other rows
                row["note"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            publish(table)
            slowest = max(slowest, time.perf_counter() - begun)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        # Further rounds time all rows in turn.
        for _ in range(1, rounds):
            for _, run, times in timed:
                if self.time_left() < 1.2 * times[-1]:
                    return
                times.append(peak_and_seconds(run, self.device, compiled=True)[1])
                self.finish(timed)
                publish(table)

    def prepare(self, variant: Variant, row: Row) -> Callable[[], None]:
        """The step, after a first run. The micro-batch is halved whenever memory runs out."""
        if variant.attention == "xformers" and importlib.util.find_spec("xformers") is None:
            raise ValueError("xformers is not installed")
        size = self.micro_batch
        while (run := self._try(variant, size, row)) is None:
            torch.cuda.empty_cache()  # outside the except block, whose traceback keeps tensors alive
            size //= 2
        return run

    def _try(self, variant: Variant, size: int, row: Row) -> Callable[[], None] | None:
        try:
            run, batch, policy = self.workload.step(variant, self.transitions, size)
            policy.passes.rows = self.workload.decodes = 0
            row["first s"] = seconds(run)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            return None
        row |= {
            "micro-batch": size,
            "weights GB": weight_bytes(policy.network) / 1e9,
            "U": policy.passes.rows / self.transitions,
        }
        row["decodes"] = self.workload.decodes / self.transitions
        row["flow calls"] = 6 - 3 * (batch.step_index == STEPS - 1).float().mean().item() if variant.ours else 6
        return run

    def finish(self, timed: list[tuple[Row, Callable[[], None], list[float]]]) -> None:
        """Update the rows from the times so far."""
        published = [times for row, _, times in timed if row["name"].startswith("published")]
        for row, _, times in timed:
            median = statistics.median(times)
            row |= {"s": median, "fastest s": min(times), "slowest s": max(times), "rounds": len(times)}
            row["transitions/s"] = self.transitions / median
            ratios = [min(others) / own for own, *others in zip(times, *published, strict=False)] if published else []
            row["vs published"] = statistics.median(ratios) if ratios else None
            row |= rates(row, self.costs, self.ceiling)


def rates(row: Row, costs: UnitCosts, ceiling: float | None) -> Row:
    """The row's TFLOP/s, and their fraction of `ceiling`."""
    flops = row["U"] * costs.network_flops + row["decodes"] * costs.decode_flops + row["flow calls"] * costs.flow_flops
    rate = flops * row["transitions/s"] / 1e12
    return {"TFLOP/s": rate, "of matmul": rate / ceiling if ceiling else None}


def markdown(result: dict[str, Any]) -> str:
    """The table, with the conditions of the measurement."""
    facts = {k: v for k, v in result["device"].items() if v is not None}
    lines = [f"# Training step, {result['model']}, {facts['hardware']}, {result['date']}", ""]
    lines += [f"- {', '.join(f'{name} {value}' for name, value in facts.items())}"]
    lines += [f"- {result['workload']}"]
    if result["matmul TFLOP/s"]:
        lines += [f"- bfloat16 product of 8192³: {result['matmul TFLOP/s']:.0f} TFLOP/s"]
    if found := result["rollout"]:
        lines += [
            f"- rollout: {found['images/s']:.3g} images/s ({found['images']} at once, {STEPS} steps and decoding), "
            f"scaled from {found['steps measured']} steps"
        ]
    lines += [f"- not run, out of time: {', '.join(result['not run']) or 'nothing'}", "", NOTES, ""]
    cells = [
        (
            *(row["name"], number(row.get("s"), ".3f")),
            f"{row['fastest s']:.3f}–{row['slowest s']:.3f}" if "s" in row else "–",
            *(number(row.get("transitions/s"), ".2f"), number(row.get("vs published"), ".2f")),
            *(number(row.get("U"), ".2f"), number(row.get("decodes"), ".2f"), number(row.get("peak GiB"), ".3f")),
            *(number(row.get("TFLOP/s"), ".3g"), number(row.get("of matmul"), ".0%")),
            *(number(row.get("gradient difference"), ".0e"), row.get("note", "")),
        )
        for row in result["rows"]
    ]
    return "\n".join([*lines, *markdown_table(HEADER, cells)]) + "\n"


def write(result: dict[str, Any], folders: list[Path], json_file: Path | None) -> None:
    """Write all files, replacing earlier ones; with `json_file`, only that one."""
    if json_file:
        json_file.write_text(as_json(result))
        return
    stem = file_stem(f"step_{result['model']}", result["device"], result["date"])
    save(result, markdown(result), stem, folders)


def main(arguments: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    default = "toy" if rows.is_dry() else "sd15" if cuda else "testbed"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=default)
    parser.add_argument("--rows", choices=ROWS, default="one-by-one", help="which variants to measure")
    parser.add_argument("--resolution", type=int, help="of the images, in pixels")
    parser.add_argument("--micro-batch", type=int, help="maximal number of transitions in one network pass")
    parser.add_argument("--transitions", type=int, help=f"transitions in a step; rounded up to a multiple of {DRAWN}")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--budget-seconds", type=float, default=240, help="time limit")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each row")
    parser.add_argument("--into", nargs="+", type=Path, default=[RESULTS], help="folders for the files")
    parser.add_argument("--json", type=Path, help="write only this JSON file")
    options = parser.parse_args(arguments)
    bench = Bench(options)
    on_cuda = bench.device.type == "cuda"
    size = f"{bench.transitions} transitions ({DRAWN} of {STEPS} steps), micro-batch {bench.micro_batch}"
    result: dict[str, Any] = {
        "theme": "step",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_info(),
        "model": options.model,
        "workload": f"{size}, {bench.pixels} px, {str(bench.dtype).removeprefix('torch.')}, guidance, random weights",
        "matmul TFLOP/s": bench.ceiling,
        "rollout": None,
        "rows": [],
        "not run": bench.not_run,
    }
    written: dict[str, Row] = {}

    def publish(table: list[Row]) -> None:
        if not rows.is_run():
            write(result | {"rows": table}, options.into, options.json)
        for row in table:
            if written.get(row["name"]) != row:
                rows.add("step", **row)
                written[row["name"]] = dict(row)
        result["rows"] = table

    if rows.is_run():
        rows.add("machine", "step", workload=result["workload"], **{"matmul TFLOP/s": bench.ceiling})
    bench.table(ROWS[options.rows](on_cuda or rows.is_dry()), options.rounds, publish)
    if bench.not_run:
        rows.add("step", "not run, out of time", note=", ".join(bench.not_run))
    if not rows.is_run():
        if bench.time_left() > 0:
            result["rollout"] = rollout(bench.workload, full(on_cuda), images=bench.micro_batch)
        else:
            bench.not_run.append("rollout")
        write(result, options.into, options.json)
        print(markdown(result))
    if failed := [row["name"] for row in result["rows"] if "note" in row]:
        raise SystemExit(f"failed, see the notes: {', '.join(failed)}")


if __name__ == "__main__":
    main()
