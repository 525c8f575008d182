"""Five key figures of a GPU run, computed from its rows."""

from typing import Any

from bench.tables import Row, Tables

EAGER, CHANNELS_LAST, COMPILED = "fastnabla", "fastnabla, channels last", "fastnabla, compiled, channels last"
PHASES = ("UNet", "decode", "reward", "rest")
MICRO_BATCHES = (4, 8, 16)


def lines(tables: Tables) -> list[str]:
    """A line for each figure, or why it is missing."""
    found = {
        "1. split of the step at micro-batch 16": split(tables),
        "2. decode + backward, ms an image": decoding(tables),
        "3. eager against compiled, and compilation": compiled(tables),
        "4. bf16 rounding floor of the trust region": rounding(tables),
        "5. transitions a second by micro-batch, and idle share": rates(tables),
    }
    dry = "dry run" in tables.get("machine", {}).get("machine", {})
    head = ["## The five figures", ""] + ["DRY RUN on a CPU: not measurements.", ""] * dry
    return [*head, *(f"- {name}: {text}" for name, text in found.items())]


def split(tables: Tables) -> str:
    row = row_of(tables, "profile", "split")
    if not row:
        return missing(tables, "profile")
    shares = ", ".join(f"{phase} {row[phase]:.1%}" for phase in PHASES)
    return f"{shares} of {row['s']:.3f} s{noted(row)}"


def decoding(tables: Tables) -> str:
    names = {"NCHW": EAGER, "channels-last": CHANNELS_LAST, "compiled": COMPILED}
    return listed(tables, "decoder", names, lambda row: f"{row['ms an image']:.2f}")


def compiled(tables: Tables) -> str:
    texts = []
    for how, part in {"blocks": "blocks", "whole": "whole"}.items():
        eager, row = row_of(tables, "compiled", f"eager, for {how}"), row_of(tables, "compiled", how)
        if row and row.get("gradients") == "agree":
            gain, seconds = row["speed-up"], row["compilation s"]
            rate = f"{eager['transitions/s']:.2f} → {row['transitions/s']:.2f} transitions/s, {gain:.2f} times"
            texts.append(f"{how} {rate}, {seconds:.0f} s to compile")
        else:
            texts.append(
                f"{how}: {row.get('note') or row.get('gradients')}" if row else f"{how}: {missing(tables, part)}"
            )
    decoder = row_of(tables, "decoder", COMPILED)
    if decoder and "first s" in decoder:
        texts.append(f"decoder: first call {decoder['first s']:.0f} s")
    return "; ".join(texts)


def rounding(tables: Tables) -> str:
    names = {f"micro-batch {size}": f"micro-batch {size}" for size in MICRO_BATCHES}
    return listed(tables, "rounding", names, lambda row: f"mean square {row['mean square']:.2e}", part="micro-batch")


def rates(tables: Tables) -> str:
    names = {str(size): f"micro-batch {size}" for size in MICRO_BATCHES}
    text = listed(tables, "micro-batch", names, lambda row: f"{row['transitions/s']:.2f}")
    profiled = row_of(tables, "profile", "split")
    idle = f"{profiled['idle']:.1%}" if profiled and profiled.get("idle") is not None else missing(tables, "profile")
    return f"{text}; idle at 16: {idle}"


def listed(tables: Tables, table: str, names: dict[str, str], text: Any, part: str | None = None) -> str:
    """`text` of each of the rows `names` (label to row name), or why it is missing."""

    def of(row: Row | None) -> str:
        if not row:
            return missing(tables, part or table)
        try:
            return text(row) + noted(row)
        except KeyError:
            return row.get("note") or "not measured"

    return ", ".join(f"{label} {of(row_of(tables, table, name))}" for label, name in names.items())


def row_of(tables: Tables, table: str, name: str) -> Row | None:
    return tables.get(table, {}).get(name)


def noted(row: Row) -> str:
    return f" ({row['note']})" if row.get("note") else ""


def missing(tables: Tables, part: str) -> str:
    """Why a figure is missing: the outcome of the part that measures it."""
    row = row_of(tables, "parts", part)
    outcome = row["outcome"].partition(", in:")[0].partition(" of:")[0] if row else "not started"
    return f"not measured (part {part}: {outcome})"
