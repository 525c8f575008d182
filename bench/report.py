"""The Markdown summary of a GPU run: what ran, the tables, and at the end the five key figures."""

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
    "group_norm_silu": "Normalisation with SiLU, of the decoder",
    "kernels": "Kernels",
    "buffer": "Trajectory buffer",
    "growth": "Growth",
}
NOTES = {
    "parts": "s: time of the part, including the start of its process. Allowed: its planned seconds plus those left over by\n"
    "earlier parts.",
    "step": "s: median wall-clock time of the rounds, with a device synchronisation at the end. first s: the first step,\n"
    "including compilation, autotuning and loading. vs published: speed-up in transitions/s over the published algorithm.\n"
    "TFLOP/s: of the passes, decodes and g_φ, without the reward. of matmul: fraction of the rate of a bfloat16 product of\n"
    "8192³. gradient difference: from the published algorithm, on toy networks; a row with a failed check is invalid.",
    "profile": "UNet, decode, reward, rest: fractions of device time in a profiled step, which is slower. idle: fraction of the\n"
    "time between the step's first and last kernel in which no kernel ran. kernels: the 20 that took longest.",
    "compiled": "off by: relative difference between a compiled pass and the eager one, of its output and its gradients to\n"
    "input and LoRA. floor: the same for an eager pass in two halves. A row with wrong gradients has no speed-up.\n"
    "compilation s: the first step minus a later one.",
    "micro-batch": "Steps of 6 m transitions, so that each micro-batch is full. Wall-clock time.",
    "rounding": "o_old from the rollout's pass at batch 16 without a graph, o_θ from the policy's pass at the micro-batch.\n"
    "The weights are the same, so the trust region's mean square should be 0. of it: the mean square times κ = 1000.",
}
LEFT_OUT = {"part", "table", "dry run"}


def markdown(tables: Tables) -> str:
    """The whole summary."""
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
    """A table's lines. Kernels and buffer are formatted by `bench.summary`, followed by what failed."""
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
    """A table with a column for every entry of the rows, in order of appearance."""
    columns = list(dict.fromkeys(k for row in rows for k, v in row.items() if k not in LEFT_OUT and fits_a_cell(v)))
    columns.sort(key=lambda column: column == "note")
    return markdown_table(tuple(columns), [tuple(cell(row.get(c)) for c in columns) for row in rows]) if rows else []


def cell(value: Any) -> str:
    """A value as text; a dash if it was not measured."""
    if not fits_a_cell(value):
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
