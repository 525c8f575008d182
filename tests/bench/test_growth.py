"""The benchmark of growth: at toy size, without time for more than its first point; and its picture."""

import json
from pathlib import Path

import pytest

from bench import growth
from bench.growth import AXES, main, plot
from bench.models import MODELS
from tests.bench.toy import ONE_LEVEL


@pytest.mark.slow
def test_writes_what_it_measured_and_names_what_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "toy", lambda: ONE_LEVEL)
    main(["--model", "toy", "--device", "cpu", "--budget-seconds", "0", "--into", str(tmp_path)])
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert files.keys() == {".json", ".md"}
    result = json.loads(files[".json"].read_text())
    first = result["growth"][0]
    assert first["axis"] == "transitions" and first["transitions"] == 12
    assert first["s"] > 0 and first["peak GiB"] > 0
    measured = {f"{point['axis']} {point[point['axis']]}" for point in result["growth"]}
    assert not measured & set(result["not run"])
    assert {name.rpartition(" ")[0] for name in measured.union(result["not run"])} == AXES.keys()
    assert all(name in files[".md"].read_text() for name in result["not run"])


def test_what_is_cut_off_leaves_the_points_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def once(point: dict, workload: object) -> None:
        if point["transitions"] > 12:
            raise KeyboardInterrupt
        point |= {"s": 1.0, "peak GiB": 0.1, "transitions/s": 12.0}

    monkeypatch.setattr(growth, "_measure", once)
    with pytest.raises(KeyboardInterrupt):
        main(["--model", "toy", "--device", "cpu", "--into", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    assert [point["transitions"] for point in json.loads(file.read_text())["growth"]] == [12]


def test_axes_with_two_points_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure, drawn = pytest.importorskip("matplotlib.figure"), []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    at = {"s": 1.0, "peak GiB": 0.1, "transitions/s": 24.0, "transitions": 24, "resolution": 8, "micro-batch": 4}
    alone = {**at, "axis": "resolution"}
    failed = {"axis": "micro-batch", "transitions": 24, "resolution": 8, "micro-batch": 8, "note": "out of memory"}
    plot([alone, {**at, "axis": "micro-batch"}, failed], tmp_path / "nothing.png")
    assert not drawn
    plot([{**at, "axis": "transitions"}, {**at, "axis": "transitions", "transitions": 48}, alone], tmp_path / "one.png")
    above, below = drawn[0].axes
    assert below.get_xlabel() == AXES["transitions"]
    assert above.lines[0].get_ydata().tolist() == pytest.approx([1000 / 24] * 2)
