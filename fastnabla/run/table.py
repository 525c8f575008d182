"""A run's result as a table: the pretrained and the finetuned model."""

from typing import Any

from rich.markup import escape, render
from rich.table import Table

from fastnabla.metrics.joint_entropy import CEILINGS


def final_table(records: list[dict[str, Any]], samples: int) -> Table:
    """The first and the last evaluation in `records`, side by side. Entropies are also given as shares of their
    ceilings.

    Args:
        records: the run's metric records.
        samples: samples per prompt of an evaluation.
    """
    evaluations = sorted((r for r in records if r["phase"] == "evaluate"), key=lambda record: record["update"])
    first, last = evaluations[0], evaluations[-1]
    table = Table(title=f"pretrained and finetuned model after {last['update']} updates, same prompts and noise")
    for column in ("metric", "pretrained", "finetuned", "change"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in last.items():
        if name in ("phase", "update"):
            continue
        measure = name.removeprefix("ema_")
        before, change = first.get(measure), ""
        if before is not None and value is not None:
            if measure != "reward":
                change = f"{value / before:.0%}" if before else ""
            elif first.get("reward_std"):
                change = f"{(value - before) / first['reward_std']:+.2f} std of pretrained"
        table.add_row(escape(name), decimals(before) if measure in first else "", decimals(value), change)
        if measure in CEILINGS and samples > 1:
            ceiling = CEILINGS[measure](samples)
            shares = ("" if each is None else f"{each / ceiling:.1%}" for each in (before, value))
            table.add_row(f"{name}, share of its ceiling for {samples} samples, {ceiling:.3f}", *shares, "")
    return table


def decimals(value: float | None) -> str:
    """A metric with four decimals. None stands for a value that is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def markdown(table: Table) -> str:
    """The table as Markdown."""
    rows = [[str(column.header) for column in table.columns], ["---"] * len(table.columns)]
    rows += [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]
    cells = (" | ".join(render(cell).plain.replace("|", "\\|") for cell in row) for row in rows)
    return f"{table.title}\n\n" + "".join(f"| {row} |\n" for row in cells)
