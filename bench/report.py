"""The summary of a GPU run: what ran, the tables, and last the five figures that decide what to do next."""

from typing import Any

from bench import figures, summary
from bench.tables import Tables, fits_a_cell, markdown_table

TITLES = {
    "parts": "Parts, in order",
    "tests": "Tests on the device",
    "step": "The whole step",
    "profile": "One step, split and profiled",
    "decoder": "Decoding with backward",
    "compiled": "The compiled step against the eager one",
    "micro-batch": "Micro-batches",
    "rollout": "Rollout",
    "rounding": "Rounding floor of the trust region",
    "kernels": "Kernels",
    "buffer": "Trajectory buffer",
    "growth": "Growth",
}
NOTES = {
    "parts": "s: of the part, start of the process included. Allowed: its seconds in the plan, and what parts before it left.",
    "step": "s: median of the rounds, wall clock, with a wait for the device at the end. first s: the first step, with what\n"
    "is compiled, chosen or loaded on the way. Vs published: as many times as many transitions a second. TFLOP/s: of the\n"
    "passes, decodes and g_φ, without the reward. Of matmul: of a bfloat16 product of 8192³. gradient difference: of toy\n"
    "networks, from the published algorithm's; a row with a failed check is no result.",
    "profile": "Shares: of the time on the device between marks, while it is profiled, which takes longer. Idle: of the time\n"
    "between the step's first and last kernel, when no kernel ran. Kernels: the 20 that took longest.",
    "compiled": "Off by: of a compiled pass's output and of its gradients to input and LoRA, relative to the eager ones.\n"
    "Floor: of the eager pass in two halves, likewise. A row whose gradients are wrong has no speed-up. Compilation: the\n"
    "first step less a later one.",
    "micro-batch": "Steps of 6 m transitions, so that each micro-batch is full. Wall clock.",
    "rounding": "o_old from the rollout's pass at batch 16 without a graph, o_θ from the policy's pass at the micro-batch;\n"
    "same weights, so the trust region's mean square should be 0. Of it: times κ = 1000.",
}
LEFT_OUT = {"part", "table", "dry run"}


def markdown(tables: Tables) -> str:
    """All of it."""
    machine = tables.get("machine", {}).get("machine", {})
    dry = "dry run" in machine
    title = f"GPU run, {machine.get('hardware', 'unknown hardware')}, {machine.get('date', '')}"
    lines = [f"# {'DRY RUN on a CPU at toy size: no figure here is a measurement' if dry else title}", ""]
    lines += [
        f"- {name} {value}" for name, value in machine.items() if fits_a_cell(value) and name not in LEFT_OUT | {"name"}
    ]
    for table in [*TITLES, *(set(tables) - TITLES.keys() - {"machine"})]:
        if rows := tables.get(table):
            lines += ["", f"## {TITLES.get(table, table)}", ""]
            lines += [NOTES[table], ""] if table in NOTES else []
            lines += body(table, list(rows.values()))
    return "\n".join([*lines, "", *figures.lines(tables)]) + "\n"


def body(table: str, rows: list[dict[str, Any]]) -> list[str]:
    """A table's lines; those of kernels and buffer as `bench.summary` has them, then what failed."""
    if table not in ("kernels", "buffer"):
        return generic(rows)
    found = [row for row in rows if "median s" in row]
    notes, header, cells = {
        "kernels": (summary.KERNEL_NOTES, summary.HEADER, summary.rows),
        "buffer": (summary.BUFFER_NOTES, summary.BUFFER_HEADER, summary.buffer_rows),
    }[table]
    failed = generic([row for row in rows if "median s" not in row])
    whole = [summary.NOTES, "", notes, "", *markdown_table(header, cells({"benchmarks": found})), ""] if found else []
    return [*whole, *failed]


def generic(rows: list[dict[str, Any]]) -> list[str]:
    """All that the rows have, in the order in which they have it."""
    columns = list(dict.fromkeys(k for row in rows for k, v in row.items() if k not in LEFT_OUT and fits_a_cell(v)))
    columns.sort(key=lambda column: column == "note")
    return markdown_table(tuple(columns), [tuple(cell(row.get(c)) for c in columns) for row in rows]) if rows else []


def cell(value: Any) -> str:
    """A value as text; a dash for what was not measured."""
    if not fits_a_cell(value):
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
