"""`bench/gpu.sh`'s parts: their order and limits, and that whatever ends a run leaves what was measured until then."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import figures, gpu, rows
from bench.gpu import PARTS, TOTAL, Part, chosen

ROOT = Path(__file__).resolve().parents[2]
ADD = "import sys, time; from bench import rows; "
"""How a stub of a part begins."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for name in (rows.FILE, rows.PART, rows.DEADLINE, rows.DRY):
        monkeypatch.delenv(name, raising=False)


def stub(name: str, code: str, seconds: float = 20, needs: tuple[str, ...] = ()) -> Part:
    return Part(name=name, seconds=seconds, commands=((sys.executable, "-c", ADD + code),), needs=needs)


def outcomes(path: Path) -> dict[str, str]:
    return {name: row["outcome"] for name, row in rows.read(path)["parts"].items()}


def test_the_plan() -> None:
    """The order of the issue, its seconds, and what is only begun if there is time left."""
    planned = {part.name: part.seconds for part in PARTS}
    first = ["build", "tests", "testbed", "step", "profile", "decoder", "blocks", "micro-batch", "kernels", "buffer"]
    assert list(planned) == [*first, "whole", "memcheck", "growth", "huge", "quantise"]
    assert sum(planned[name] for name in first) == 525
    assert TOTAL + 2 * gpu.GRACE < 590


def test_every_command_can_be_found() -> None:
    """Modules and files that the parts name exist, so a renamed one is noticed here."""
    for part in PARTS:
        for command in part.commands:
            if "-m" in command and command[command.index("-m") + 1] != "pytest":
                assert gpu.has(command[command.index("-m") + 1]), command
            assert all((ROOT / word).exists() for word in command if word.endswith(".py")), command


def test_parts_are_named_on_the_command_line() -> None:
    assert [part.name for part in chosen([], PARTS)] == [part.name for part in PARTS]
    assert [(part.name, part.seconds) for part in chosen(["decoder=200", "step"], PARTS)] == [
        ("decoder", 200),
        ("step", 120),
    ]
    for wrong in ("decode", "step=0", "step=soon", "step=nan"):
        with pytest.raises(SystemExit, match=wrong.partition("=")[0]):
            chosen([wrong], PARTS)


def test_a_failure_hides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    parts = [
        stub("step", "rows.add('step', 'a', s=1.5); sys.exit(3)"),
        stub("decoder", "rows.add('decoder', 'fastnabla', **{'ms an image': 12.5})"),
        stub("blocks", "", needs=("no_such_package",)),
    ]
    assert not gpu.run(parts, path, total=60)
    tables, found = rows.read(path), outcomes(path)
    assert tables["step"]["a"]["s"] == 1.5 and tables["decoder"]["fastnabla"]["part"] == "decoder"
    assert found["step"].startswith("failed, exit status 3") and found["decoder"] == "passed"
    assert found["blocks"] == "skipped, not installed: no_such_package"
    text = path.with_suffix(".md").read_text()
    assert "NCHW 12.50" in text and "blocks: not measured (part blocks: skipped" in text


@pytest.mark.slow
def test_limits(tmp_path: Path) -> None:
    """A part ends with its seconds, and those that the ones before left, together with all that it has started; nothing is
    begun after the total."""
    path, alive = tmp_path / "run.jsonl", tmp_path / "alive"
    child = f"import time\nwhile 1: time.sleep(.05); open({str(alive)!r}, 'a').write('.')"
    forever = f"import subprocess; subprocess.Popen([sys.executable, '-c', {child!r}]); rows.add('step', 'a', s=1.0); time.sleep(60)"
    left = "rows.add('step', 'left', s=rows.time_left())"
    parts = [stub("quick", "", 3), stub("late", left, 3), stub("step", forever, 2), stub("never", left, 30)]
    start = time.monotonic()
    gpu.run(parts, path, total=8)
    assert time.monotonic() - start < 8 + 2 * gpu.GRACE
    found = outcomes(path)
    assert found["quick"] == found["late"] == "passed" and found["step"].startswith("timed out")
    assert 3 < rows.read(path)["step"]["left"]["s"] < 6
    assert found["never"] == "not started, no time left"
    size = alive.stat().st_size
    time.sleep(0.3)
    assert alive.stat().st_size == size


SCRIPT = """
import sys
from pathlib import Path
from bench import gpu
from tests.bench.test_gpu_run import ADD
code = ADD + "[(rows.add('growth', f'row {n}', s=float(n)), time.sleep(.02)) for n in range(1000)]"
gpu.module = lambda name, *arguments: (sys.executable, "-c", ADD + "rows.add('machine', 'machine', hardware='a stub')")
part = gpu.Part(name="growth", seconds=60, commands=((sys.executable, "-c", code),))
sys.exit(gpu.main([], [part]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_at_any_moment_leaves_rows_and_summary(tmp_path: Path, number: signal.Signals) -> None:
    """Of everything at once (SIGKILL), or of the run alone, which then ends its part and prints the summary."""
    for wait in (0.0, 0.03, 0.11):
        out = tmp_path / str(wait)
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "OUT": str(out)},
            start_new_session=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not (found := [*out.glob("*.jsonl")]) or not rows.read(found[0]).get("growth"):
            assert time.monotonic() < deadline, "no row was written"
            time.sleep(0.01)
        time.sleep(wait)
        part = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if number == signal.SIGKILL:
            for pid in (process.pid, *map(int, part)):
                os.kill(pid, number)
        else:
            process.send_signal(number)
        printed = process.communicate(timeout=30)[0]
        tables, summary = rows.read(found[0]), found[0].with_suffix(".md").read_text()
        measured = [int(name.removeprefix("row ")) for name in tables["growth"]]
        assert measured == list(range(len(measured)))
        # The summary lacks at most the row that was being added.
        assert f"| row {measured[-1]} |" in summary or f"| row {measured[-2]} |" in summary
        assert "a stub" in summary and "## The five figures" in summary
        assert len([*out.iterdir()]) <= 3
        if number == signal.SIGTERM:
            assert printed.rstrip().endswith(summary.rstrip().splitlines()[-1])
            assert not [pid for pid in part if Path("/proc", pid).exists()]


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({"table": "step", "name": "a", "s": 1.0}) + '\n{"table": "step", "na')
    assert rows.read(path) == {"step": {"a": {"table": "step", "name": "a", "s": 1.0}}}


def test_a_dry_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every row, in the summary and beside the figures; and it never writes into bench/results."""
    monkeypatch.setenv(rows.DRY, "1")
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert not gpu.folder_of_results().is_relative_to(ROOT)
    path = tmp_path / "run.jsonl"
    rows.append(path, {"part": "machine", "table": "machine", "name": "machine", "hardware": "a CPU"})
    gpu.run([stub("step", "rows.add('step', 'a', s=1.0)")], path, total=60)
    assert all(json.loads(line)["dry run"] for line in path.read_text().splitlines())
    text = path.with_suffix(".md").read_text()
    assert text.startswith("# DRY RUN") and "DRY RUN on a CPU: not measurements" in text


def test_the_five_figures() -> None:
    """Taken from the rows of the parts that measure them; a wrong gradient is told instead of a speed-up."""
    compiled = {"transitions/s": 8.0, "s": 6.0, "speed-up": 1.6, "compilation s": 41.0, "gradients": "agree"}
    tables = {
        "profile": {"split": {"UNet": 0.5, "decode": 0.3, "reward": 0.1, "rest": 0.1, "s": 9.0, "idle": 0.02}},
        "decoder": {
            figures.EAGER: {"ms an image": 30.0},
            figures.CHANNELS_LAST: {"ms an image": 20.0},
            figures.COMPILED: {"ms an image": 15.0, "first s": 33.0},
        },
        "compiled": {"eager, for blocks": {"transitions/s": 5.0}, "blocks": compiled},
        "rounding": {f"micro-batch {n}": {"mean square": 1e-5 * n} for n in (4, 8, 16)},
        "micro-batch": {f"micro-batch {n}": {"transitions/s": float(n)} for n in (4, 8, 16)},
    }
    text = "\n".join(figures.lines(tables))
    for expected in (
        *(
            "UNet 50.0%, decode 30.0%, reward 10.0%, rest 10.0% of 9.000 s",
            "NCHW 30.00, channels-last 20.00, compiled 15.00",
        ),
        *(
            "blocks 5.00 → 8.00 transitions/s, 1.60 times, 41 s to compile",
            "whole: not measured (part whole: not started)",
        ),
        *(
            "decoder: first call 33 s",
            "micro-batch 4 mean square 4.00e-05",
            "4 4.00, 8 8.00, 16 16.00; idle at 16: 2.0%",
        ),
    ):
        assert expected in text
    wrong = {**compiled, "gradients": "WRONG: 3 of 9 tensors are 0", "note": "WRONG: 3 of 9 tensors are 0"}
    tables["compiled"]["blocks"] = {name: value for name, value in wrong.items() if name != "speed-up"}
    found = "\n".join(figures.lines(tables))
    assert "blocks: WRONG: 3 of 9 tensors are 0" in found and "times" not in re.sub("five.*", "", found)


@pytest.mark.slow
def test_pytest_results_become_rows(tmp_path: Path) -> None:
    """Passed, failed, skipped and not collected; a failure is a row at once, with its reason; nothing begins too late."""
    (tmp_path / "test_stub.py").write_text(
        "import os, pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2, 'made to fail'\n"
        "def test_skips(): pytest.skip('no reason')\n"
        f"def test_uses_the_time(): os.environ[{rows.DEADLINE!r}] = '0'\n"
        "def test_is_late(): pass\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    path = tmp_path / "run.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "bench.recorder",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    around = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables = {rows.FILE: str(path), rows.PART: "tests", rows.DEADLINE: str(time.time() + 600)}
    for extra in ((), ("-n", "1")):
        path.unlink(missing_ok=True)
        done = subprocess.run(
            [*command, *extra, "-c", "/dev/null", str(tmp_path)],
            env=around | variables,
            capture_output=True,
            text=True,
        )
        found = rows.read(path)["tests"]
        counts = found["all tests"]
        assert counts["failed"] == counts["skipped"] == counts["not collected"] == 1, done.stdout
        assert counts["passed"] == 2 and counts["not started, no time left"] == 1
        assert any("made to fail" in row.get("note", "") for row in found.values())
        assert any("no_such_module" in row.get("note", "") for row in found.values())
