"""Measures how the time and memory of a training step grow with its transitions, the resolution and the micro-batch.

    python -m bench.growth [--model sd15] [--budget-seconds 240]

The step is fastnabla's, not compiled, otherwise as in `bench.whole_step`. Points that there was no time for are listed. The
files `growth_<model>_<hardware>_<date>.json`, `.md` and, with matplotlib, `.png` are rewritten after every point. In a GPU run
the points go to the run's files instead.
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

from bench import rows
from bench.files import RESULTS, file_stem, save
from bench.measure import device_info, peak_and_seconds
from bench.models import MODELS, Model
from bench.tables import markdown_table
from bench.variants import full
from bench.workload import DRAWN, STEPS, Workload
from fastnabla.utils.console import quiet_libraries

AXES = {"transitions": "transitions in a step", "resolution": "resolution, pixels", "micro-batch": "micro-batch"}
Point = dict[str, Any]


def sizes(model: Model, cuda: bool) -> dict[str, list[int]]:
    """The values of each of the `AXES`; the others stay at `base`."""
    return {
        "transitions": [12, 24, 48, 96, 192, 384, 516] if cuda else [12, 24, 96, 516],
        "resolution": [model.pixels * n // 4 for n in ((2, 3, 4, 6, 8) if cuda else (2, 4, 6))],
        "micro-batch": [1, 2, 4, 8, 16],
    }


def base(model: Model, cuda: bool) -> Point:
    """The point that all axes pass through."""
    return {"transitions": 24, "resolution": model.pixels, "micro-batch": model.micro_batch if cuda else 4}


def growth(
    model: Model, device: torch.device, deadline: float, not_run: list[str], publish: Callable[[list[Point]], None]
) -> None:
    """Measure the points, axis by axis, at least one. `publish` is called with all points so far after each of them. Points
    that there is no time for before `deadline` (in `time.perf_counter`'s time) are added to `not_run`."""
    cuda, points = device.type == "cuda", []
    dtype = torch.bfloat16 if cuda else torch.float32
    workload = Workload(model, model.pixels, device, dtype)
    for axis, values in sizes(model, cuda).items():
        last, failed = 0.0, False
        for value in values:
            left = deadline - time.perf_counter()
            if points and (failed or left < max(0, 1.5 * last)):
                not_run.append(f"{axis} {value}")
                continue
            point = {"axis": axis, **base(model, cuda), axis: value}
            same = next((p for p in points if all(p[name] == point[name] for name in AXES)), None)
            points.append(point)
            if same is not None:
                point |= {**same, "axis": axis}
                publish(points)
                continue
            start = time.perf_counter()
            try:
                at = workload
                if point["resolution"] != model.pixels:
                    at = Workload(model, point["resolution"], device, dtype)
                _measure(point, at)
            except Exception as error:  # most likely out of memory
                point["note"], failed = f"{type(error).__name__}: {error}".splitlines()[0][:160], True
            last = time.perf_counter() - start
            publish(points)
            if cuda:
                torch.cuda.empty_cache()


def _measure(point: Point, workload: Workload) -> None:
    run, *_ = workload.step(full(workload.device.type == "cuda"), point["transitions"], point["micro-batch"])
    run()
    point["peak GiB"], once = peak_and_seconds(run, workload.device)
    again = [peak_and_seconds(run, workload.device, compiled=True)[1] for _ in range(2)]
    point["s"] = statistics.median([once, *again])
    point["transitions/s"] = point["transitions"] / point["s"]


def markdown(result: dict[str, Any]) -> str:
    """The table, with the conditions of the measurement."""
    facts = {name: value for name, value in result["device"].items() if value is not None}
    cells = [
        (
            *(point["axis"], *(str(point[axis]) for axis in AXES)),
            *(format(point[name], form) if name in point else "–" for name, form in
              (("s", ".3f"), ("transitions/s", ".2f"), ("peak GiB", ".3f"))),
            point.get("note", ""),
        )
        for point in result["growth"]
    ]  # fmt: skip
    lines = [
        f"# Growth of the training step, {result['model']}, {facts['hardware']}, {result['date']}",
        "",
        f"- {', '.join(f'{name} {value}' for name, value in facts.items())}",
        f"- {result['workload']}",
        f"- not run, out of time: {', '.join(result['not run']) or 'nothing'}",
        "",
        "s: median of three; CPU time for a single CPU thread, otherwise wall-clock time. Peak: memory in addition to the",
        "weights.",
        "",
        *markdown_table(("varied", *AXES, "s", "transitions/s", "peak GiB", "note"), cells),
    ]
    return "\n".join(lines) + "\n"


def plot(points: list[Point], path: Path) -> None:
    """Plot milliseconds a transition and peak memory into a PNG file, over each of the `AXES` that has two points."""
    measured = [point for point in points if "s" in point]
    by_axis = {axis: [point for point in measured if point["axis"] == axis] for axis in AXES}
    by_axis = {axis: found for axis, found in by_axis.items() if len(found) > 1}
    if not by_axis:
        return
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed, so growth is not plotted")
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(3 * len(by_axis), 5), layout="constrained")
    axes = figure.subplots(2, len(by_axis), sharex="col", sharey="row", squeeze=False)
    rows = {
        "ms a transition": lambda point: 1e3 / point["transitions/s"],
        "peak memory, GiB": lambda point: point["peak GiB"],
    }
    for row, (label, value) in enumerate(rows.items()):
        axes[row][0].set_ylabel(label)
        axes[row][0].set_ylim(0, 1.08 * max(value(point) for found in by_axis.values() for point in found))
        for panel, (axis, found) in zip(axes[row], by_axis.items(), strict=True):
            panel.plot([point[axis] for point in found], list(map(value, found)), "o-", color=f"C{row}")
            panel.set_xscale("log", base=2)
            panel.set_xticks([point[axis] for point in found], [str(point[axis]) for point in found])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.grid(axis="y", alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
            if row:
                panel.set_xlabel(AXES[axis])
    figure.savefig(path, dpi=120)


def write(result: dict[str, Any], folders: list[Path]) -> None:
    """Write all files, replacing earlier ones."""
    stem = file_stem(f"growth_{result['model']}", result["device"], result["date"])
    save(result, markdown(result), stem, folders)
    for folder in folders:
        plot(result["growth"], folder / f"{stem}.png")


def main(arguments: list[str] | None = None) -> None:
    quiet_libraries()
    cuda = torch.cuda.is_available()
    default = "toy" if rows.is_dry() else "sd15" if cuda else "testbed"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=default)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--budget-seconds", type=float, default=240, help="time limit")
    parser.add_argument("--into", nargs="+", type=Path, default=[RESULTS], help="folders for the files")
    options = parser.parse_args(arguments)
    device, model, not_run = torch.device(options.device), MODELS[options.model](), []
    deadline = time.perf_counter() + min(options.budget_seconds, rows.time_left())
    fixed = ", ".join(f"{name} {value}" for name, value in base(model, device.type == "cuda").items())
    result: dict[str, Any] = {
        "theme": "growth",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_info(),
        "model": options.model,
        "workload": f"unless varied: {fixed}; {DRAWN} of {STEPS} steps, guidance, random weights",
        "growth": [],
        "not run": not_run,
    }

    def publish(points: list[Point]) -> None:
        rows.add("growth", f"{points[-1]['axis']} {points[-1][points[-1]['axis']]}", **points[-1])
        result["growth"] = points
        if not rows.is_run():
            write(result, options.into)

    growth(model, device, deadline, not_run, publish)
    if rows.is_run():
        rows.add("growth", "not run, out of time", note=", ".join(not_run) or "nothing")
    else:
        write(result, options.into)


if __name__ == "__main__":
    main()
