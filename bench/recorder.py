"""A pytest plugin for GPU runs (`-p bench.recorder`): records each result immediately, and skips what starts after the
deadline.

Benchmarks become rows of a table named after their file; a failed benchmark's row has the reason. Tests' outcomes are counted,
and failures become rows.
"""

import collections
import os
import time
from pathlib import Path
from typing import Any

import pytest

from bench import rows
from bench.summary import condensed

NO_TIME = "not started, no time left"
COUNTS: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
"""Outcomes, by table."""
EVERY = 2.0
"""Seconds between two updates of the counts."""


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # xdist workers report to the process that started them
        config.pluginmanager.register(Recorder())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if rows.time_left() <= 0:
        pytest.skip(NO_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    """Attach a benchmark's results to its report."""
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if report.when == "call" and report.passed and benchmark is not None and benchmark.stats is not None:
        stats = benchmark.stats.stats
        times = {"median": stats.median, "iqr": stats.iqr, "rounds": stats.rounds}
        extra = {k: v for k, v in benchmark.extra_info.items() if k != "device"}
        report.row = condensed(extra.pop("row", item.name), benchmark.group, times, extra)
    return report


class Recorder:
    """Adds rows for results as they are reported."""

    def __init__(self) -> None:
        self.shown = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        table, counts = self._table(report)
        if report.failed:
            counts["failed"] += 1
            rows.add(table, report.nodeid, note=reason(report))
        elif report.skipped:
            counts[NO_TIME if NO_TIME in str(report.longrepr) else "skipped"] += 1
        elif report.when == "call":
            counts["passed"] += 1
        if hasattr(report, "row"):
            rows.add(table, **report.row)
        if time.monotonic() - self.shown > EVERY:
            self.show()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            table, counts = self._table(report)
            counts["not collected"] += 1
            rows.add(table, report.nodeid, note=reason(report))

    def pytest_sessionfinish(self) -> None:
        self.show()

    def show(self) -> None:
        """Add rows with the counts so far."""
        self.shown = time.monotonic()
        for table, counts in COUNTS.items():
            rows.add("tests", "all tests" if table == "tests" else f"benchmarks of {table}", **counts)

    def _table(self, report: Any) -> tuple[str, collections.Counter[str]]:
        stem = Path(report.nodeid.partition("::")[0]).stem
        table = stem.removeprefix("bench_") if stem.startswith("bench_") else "tests"
        return table, COUNTS[table]


def reason(report: Any) -> str:
    """The reason of a failure or skip, in a line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines()
    return (lines[0] if crash else lines[-1])[:200] if lines else report.outcome
