"""Summarises a run of the benchmarks as a table on the screen and as small files to keep.

    python -m bench.summary RAW.json [RAW.json …] [--into FOLDER …] [--theme kernels] [--tests OUTCOME]

reads what `pytest bench --benchmark-json RAW.json` wrote, writes `<theme>_<hardware>_<date>.json` and `.md` into each
folder (by default bench/results), and prints the rows of whole passes and of the buffer. The JSON file has the device, the
versions and the commit, and for each benchmark the median and interquartile range in seconds, the rounds and its extra_info. A
number that was not measured is a dash.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from bench.files import RESULTS, file_stem, save
from bench.tables import markdown_table, number

EAGER, COMPILE, OURS = PROVIDERS = ("published eager", "compiled plain", "fastnabla")
HEADER = (
    *("operation", "pass", "shape", "batch"),
    *("eager wall µs", "on device", "compiled wall µs", "on device", "fastnabla wall µs", "on device"),
    *("wall vs eager", "on device", "wall vs compiled", "on device", "GB/s", "of copy"),
)
NOTES = """\
Wall times are medians of a call with a device synchronisation, including launches. A wall time marked h is more than twice the
device time: it is host-bound, and shows how long Python and launching take. On device: replayed from a CUDA graph with a cold
L2 cache, without launches. Of copy: fraction of the bandwidth of a large copy. A dash: not measured."""
KERNEL_NOTES = """\
The kernels. Vs: speed-up over the published algorithm in eager torch, and over plain torch compiled by torch.compile. GB/s:
bytes that the operation must move, divided by fastnabla's device time, or by its wall time if there is none."""
BUFFER_HEADER = (
    *("operation", "buffer", "wall ms", "on device", "vs reference", "on device", "vs index_select", "on device"),
    *("GB/s", "of copy", "KiB a trajectory", "of reference"),
)
BUFFER_NOTES = """\
The trajectory buffer: storing a whole rollout, or gathering all its drawn transitions (see bench/bench_buffer.py), in ms. Vs:
speed-up over the reference's pattern, and over index_select for each field. GB/s: bytes read and written, divided by the device
time or the wall time. Caches are cold, except that gathered transitions go to recently used memory."""


def condense(raws: list[dict[str, Any]], theme: str, tests: str | None) -> dict[str, Any]:
    """The part of pytest-benchmark's files that is kept."""
    device, benchmarks = {}, []
    for benchmark in (benchmark for raw in raws for benchmark in raw["benchmarks"]):
        extra = dict(benchmark["extra_info"])
        if not extra:  # the benchmark was interrupted
            continue
        device = extra.pop("device", None) or device
        benchmarks.append(condensed(benchmark["name"], benchmark["group"], benchmark["stats"], extra))
    date = datetime.datetime.fromisoformat(raws[0]["datetime"]).date().isoformat()
    return {"theme": theme, "date": date, "device": device, "GPU tests": tests, "benchmarks": benchmarks}


def condensed(name: str, group: str, stats: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """The part of a benchmark's results that is kept; `extra` is its own extra_info."""
    times = {"median s": stats["median"], "IQR s": stats["iqr"], "rounds": stats["rounds"]}
    return {"name": name, "group": group, **times, **extra}


def rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells by operation, pass, shape and batch, in the order of `HEADER`."""
    cases: dict[tuple, dict[str, dict[str, Any]]] = {}
    for benchmark in summary["benchmarks"]:
        if "provider" in benchmark:
            key = tuple(benchmark[name] for name in ("operation", "direction", "shape", "batch"))
            cases.setdefault(key, {})[benchmark["provider"]] = benchmark
    return [_row(key, case) for key, case in sorted(cases.items(), key=lambda item: _order(item[0], list(cases)))]


def _order(key: tuple, keys: list[tuple]) -> tuple:
    """By operation and pass, then by shape as first met, then by batch."""
    shapes = list(dict.fromkeys(shape for _, _, shape, _ in keys))
    return key[0], key[1], shapes.index(key[2]), key[3]


def _row(key: tuple, case: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    def times(provider: str) -> tuple[float | None, float | None]:
        found = case.get(provider)
        return (1e6 * found["median s"], found.get("graph us")) if found else (None, None)

    eager, compiled, ours = (times(provider) for provider in PROVIDERS)
    measured = case.get(OURS, {})
    return (
        *map(str, key),
        *(
            text
            for wall, device in (eager, compiled, ours)
            for text in (_wall(wall, device, ".1f"), number(device, ".1f"))
        ),
        *(_ratio(other, own) for others in (eager, compiled) for other, own in zip(others, ours, strict=True)),
        number(measured.get("GB/s"), ".0f"),
        number(measured.get("share of copy"), ".0%"),
    )


def _wall(wall: float | None, device: float | None, form: str) -> str:
    """A wall time, marked if it is host-bound."""
    return number(wall, form) + " h" * bool(wall and device and wall > 2 * device)


def _ratio(other: float | None, own: float | None) -> str:
    return number(other / own if other and own else None, ".2f")


def buffer_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the buffer's benchmarks, in the order of `BUFFER_HEADER`."""
    found = [benchmark for benchmark in summary["benchmarks"] if "buffer" in benchmark]
    times: dict[tuple[str, str], tuple[float | None, float | None]] = {
        (b["operation"], b["buffer"]): (1e3 * b["median s"], b["graph us"] and b["graph us"] / 1e3) for b in found
    }

    def row(b: dict[str, Any]) -> tuple[str, ...]:
        own = times[b["operation"], b["buffer"]]
        others = [times.get((b["operation"], base), (None, None)) for base in ("reference's pattern", "index_select")]
        return (
            *(b["operation"], b["buffer"], _wall(*own, ".3f"), number(own[1], ".3f")),
            *(_ratio(*pair) for other in others for pair in zip(other, own, strict=True)),
            *(number(b["GB/s"], ".1f"), number(b["share of copy"], ".0%")),
            *(number(b["bytes a trajectory"] / 1024, ".0f"), number(b["of reference"], ".1%")),
        )

    return [row(b) for b in sorted(found, key=lambda b: b["operation"])]


def markdown(summary: dict[str, Any], raw_file: str) -> str:
    """All results as Markdown, with the facts about the machine."""
    device = summary["device"]
    lines = [f"# {summary['theme'].capitalize()}, {device.get('hardware', 'unknown hardware')}, {summary['date']}", ""]
    lines += [*(f"- {fact}" for fact in facts(summary)), f"- all numbers: `{raw_file}`", "", NOTES]
    if kernels := rows(summary):
        lines += ["", KERNEL_NOTES, "", *markdown_table(HEADER, kernels)]
    if buffers := buffer_rows(summary):
        lines += ["", BUFFER_NOTES, "", *markdown_table(BUFFER_HEADER, buffers)]
    others = [benchmark for benchmark in summary["benchmarks"] if not {"provider", "buffer"} & benchmark.keys()]
    if others:
        lines += ["", "| benchmark | median ms |", "|---|---|"]
        lines += [f"| {other['group']}: {other['name']} | {1e3 * other['median s']:.1f} |" for other in others]
    return "\n".join(lines) + "\n"


def facts(summary: dict[str, Any]) -> list[str]:
    """The conditions that the numbers depend on."""
    found = [", ".join(f"{name} {value}" for name, value in summary["device"].items() if value is not None)]
    for provider in PROVIDERS:
        computed_by = {b["computed by"]: None for b in summary["benchmarks"] if b.get("provider") == provider}
        found += [f"{provider}: {', '.join(computed_by)}"] if computed_by else []
    dtypes = {b["output dtype"]: None for b in summary["benchmarks"] if "provider" in b}
    found += [f"outputs: {', '.join(dtypes)}"] if dtypes else []
    copies = {f"{b['copy GB/s']:.0f} GB/s": None for b in summary["benchmarks"] if "copy GB/s" in b}
    for b in summary["benchmarks"]:
        if "read GB/s" in b:
            link = f"{b['read GB/s']:.1f} GB/s over the link, a copy {b['host to device GB/s']:.1f}"
            found.append(f"{b['buffer']}: {b['operation']} reads {link}")
    return [*found, f"copy: {', '.join(copies)}", f"GPU tests: {summary['GPU tests'] or 'not run'}"]


def screen(summary: dict[str, Any]) -> str:
    """The rows of whole passes and of the buffer, as aligned text."""
    apart = {(cells[0], cells[2], cells[3]) for cells in rows(summary) if cells[1] == "both"}
    whole = [cells for cells in rows(summary) if cells[1] == "both" or (cells[0], *cells[2:4]) not in apart]
    tables = [[HEADER, *whole], [BUFFER_HEADER, *buffer_rows(summary)]]
    return "\n\n".join(_aligned(table) for table in tables if len(table) > 1)


def _aligned(table: list[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True)) for cells in table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", nargs="+", type=Path, help="files of --benchmark-json")
    parser.add_argument("--into", nargs="+", type=Path, default=[RESULTS], help="folders for the two files")
    parser.add_argument("--theme", default="kernels", help="first part of the files' names")
    parser.add_argument("--tests", help="outcome of the GPU tests, recorded with the numbers")
    options = parser.parse_args()
    summary = condense([json.loads(path.read_text()) for path in options.raw], options.theme, options.tests)
    name = file_stem(options.theme, summary["device"], summary["date"])
    save(summary, markdown(summary, f"{name}.json"), name, options.into)
    for folder in options.into:
        print(f"wrote {folder / name}.json and .md")
    print("", *facts(summary), "", screen(summary), sep="\n")


if __name__ == "__main__":
    main()
