"""Text from outside is shown as it is: on the terminal, in pictures, in the names that trackers get."""

import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastnabla import sample, train
from fastnabla.evaluation.report import result_tables
from fastnabla.metrics.divergence import divergence_summary
from fastnabla.run import pictures
from fastnabla.run.folder import create_run_folder
from fastnabla.run.pictures import save_curves, save_grid
from fastnabla.run.table import final_table, markdown
from fastnabla.run.tracker import Tracker, read_records, tracker_keys
from fastnabla.utils.console import print_error, print_plain, print_traceback
from fastnabla.utils.printable import CONTROL, printable
from tests.integration.test_cli import QUICK
from tests.tokens import TOKENS

ODD = [
    "[red]",
    "[/]",
    "[/red]x",
    ":smile:",
    "a\x1b[2Jb",
    "\x9b31m",
    "\u202egnp",
    "\udcff",
    "\a\r\0",
    "<b>&",
    "$x_$",
    "$$",
]


@given(st.text())
def test_printable_text_has_no_control_characters_but_line_feeds_and_tabs(text: str) -> None:
    shown = printable(text)
    assert set(CONTROL.findall(shown)) <= set("\n\t")
    assert printable(shown) == shown
    shown.encode()


@pytest.mark.parametrize("text", ODD)
def test_a_line_is_printed_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_plain(Console(force_terminal=True, width=40), text * 20)
    print_error(text)
    printed = capsys.readouterr()
    assert printable(text) * 20 in printed.out
    assert printed.err == f"error: {printable(text)}\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["[red]:smile:\udcff\x1b[2J猫", "-x $'\"*?["])
def test_run_folders_of_any_name(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([*QUICK, f"--run={name}"]) == 0
    printed = capsys.readouterr().out
    assert f"writing to {printable(name)};" in printed and f"metrics are in {printable(name)}\n" in printed
    assert not CONTROL.search(printed.replace("\n", "").replace("\r", ""))
    assert train.main([f"--resume={name}"]) == 0
    assert os.listdir(tmp_path) == [name]


def test_the_next_free_run_folder_of_a_name_with_wildcards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert [create_run_folder(None, "[a]*").name for _ in range(2)] == ["[a]*-001", "[a]*-002"]


PROMPTS = [
    "$x_{",
    "$\\frac{1}{2}$",
    "a $5 and a $10 cat",
    "👩‍🚀 猫",
    "אבג a",
    "\x1b[2J\a",
    "../../etc/x",
    "[red]<b>",
    "x" * 90,
    "%s {}",
]


@pytest.mark.usefixtures("drawn")
def test_pictures_show_any_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warning, and mathematics is never set: the labels are the prompts."""
    labels = []
    figures, save = (
        pictures._save,
        lambda figure, path: (labels.extend(figure.axes[0].get_yticklabels()), figures(figure, path)),
    )
    monkeypatch.setattr(pictures, "_save", save)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_grid(tmp_path / "grid.png", {"pretrained": torch.rand(2 * len(PROMPTS), 3, 8, 8)}, PROMPTS)
    shown = [label.get_text() for label in labels]
    assert shown == [label if len(label) < 40 else label[:37] + "…" for label in map(printable, PROMPTS)]
    assert not any(label.get_parse_math() for label in labels)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.height > 300
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.slow
def test_file_names_never_come_from_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.txt").write_text("\n".join(p for p in PROMPTS if not CONTROL.search(p)))
    (tmp_path / "plain.txt").write_text("".join(f"a cat, number {i}\n" for i in range(len(PROMPTS))))
    for name in ("odd", "plain"):
        command = [*QUICK, "--prompts.source", f"{name}.txt", "--reward.terms", "area", "--evaluation.probe", "none"]
        assert train.main([*command, "--evaluation.prompts=9", "--sampler.steps=2", "--run", name]) == 0
    trees: Sequence[set[str]] = [{str(path.relative_to(n)) for path in Path(n).rglob("*")} for n in ("odd", "plain")]
    assert trees[0] == trees[1]
    assert sorted(os.listdir()) == ["odd", "odd.txt", "plain", "plain.txt"]


def test_prompts_to_sample_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(["run", "--prompt", "a cat", "\udcff"]) == 2
    assert "not UTF-8 text (byte 0xFF)" in capsys.readouterr().err


NAMES = ["reward_pkg.mod:fn", "reward_pkg.mod_fn", "reward_pkg_mod:fn", "reward_é:ü", "rollout_reward_[red]:x|y"]


def test_names_for_trackers_are_plain_and_different() -> None:
    keys = tracker_keys(f"train/{name}" for name in NAMES)
    assert keys["train/reward_pkg.mod:fn"] == "train/reward_pkg_mod_fn"
    assert len(set(keys.values())) == len(NAMES)
    assert all(
        CONTROL.search(key) is None and set(key) <= set(map(chr, range(128))) - set(":.[]|") for key in keys.values()
    )


def test_rewards_of_any_name_reach_tensorboard_and_the_tables(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "tensorboard", {})
    for update in (0, 1):
        tracker.log(
            "evaluate", update, {"reward": 1.0, "reward_std": 0.5} | {name: float(i) for i, name in enumerate(NAMES)}
        )
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Tags()["scalars"]) == len(NAMES) + 2
    table = final_table(tracker.records, 8)
    assert "rollout_reward_[red]:x\\|y" in markdown(table) and "`" not in markdown(table)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    assert all(name in capture.get() for name in NAMES)


def test_the_evaluations_table_shows_run_names_as_they_are() -> None:
    model = {"reward_[red]:x": 1.0, "hue_entropy": 0.5, "joint_entropy": 0.5}
    group = {"pretrained": model, "finetuned": model, "divergence": divergence_summary(torch.ones(2, 4))}
    group |= {"hue_entropy_ceiling": 0.8, "joint_entropy_ceiling": 0.8, "reference_floor": {}}
    group["targets"] = {"tilted": None, "same_reward": None}
    console = Console(width=200)
    with console.capture() as capture:
        result = {"run": "runs/[red]\x1b[2J", "settings": {"target_beta": 1.0}, "groups": {"trained": group}}
        console.print(result_tables([result])[0])
    assert "[red]\\x1b[2J" in capture.get() and "reward_[red]:x" in capture.get()


@pytest.mark.usefixtures("drawn")
def test_what_is_not_finite_is_null_and_everything_reads_it(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "none", {})
    nan, inf = float("nan"), float("inf")
    first = {"reward": 1.0, "reward_std": nan, "pairwise_distance": inf, "vendi": 1.0}
    tracker.log("evaluate", 0, first, {"gpu_power_watts": nan})
    tracker.log("train", 1, {"loss_forward": nan, "norm_ref": -inf, "skipped": 1})
    tracker.log("evaluate", 1, {"reward": nan, "reward_std": 0.1, "pairwise_distance": 1.0, "vendi": None})
    for name in ("metrics.jsonl", "timing.jsonl"):
        text = (tmp_path / name).read_text()
        assert "null" in text and "NaN" not in text and "Infinity" not in text
    assert read_records(tmp_path / "metrics.jsonl", 9) == tracker.records
    assert tracker.last_in_a_row("skipped") == 1
    assert [record["reward"] for record in tracker.records if "reward" in record] == [1.0, None]
    save_curves(tmp_path / "curves.png", tracker.records)
    assert "not finite" in markdown(final_table(tracker.records, 8))


def test_records_with_nan_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"phase": "train", "update": 1, "loss": NaN}\n')
    assert read_records(path, 1) == [{"phase": "train", "update": 1, "loss": None}]
    assert path.read_text() == '{"phase": "train", "update": 1, "loss": null}\n'


@pytest.mark.slow
def test_secrets_of_the_environment_are_written_nowhere(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret, started = "hf_QmFzZTY0U2VjcmV0", []
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)

    def init(**arguments):
        started.append(arguments)
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=SimpleNamespace()))
    monkeypatch.chdir(tmp_path)
    for tracker in ("wandb", "tensorboard"):
        assert train.main([*QUICK, f"--tracker={tracker}", f"--run={tracker}"]) == 0
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and not any(secret.encode() in content for content in written)
    printed = capfd.readouterr()
    assert secret not in printed.out + printed.err + repr(started)
    assert started[0]["settings"] == {"disable_git": True, "disable_code": True}
    assert set(started[0]) == {"dir", "config", "name", "settings", "id", "resume"}


def test_secrets_are_not_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)
    addresses = "https://me:pass@mirror/x?a@b, http://hf_x@[::1]:8080 and https://a/b@c"
    try:
        raise RuntimeError(f"{addresses}; {' '.join(TOKENS.values())}")
    except RuntimeError as error:
        print_error(error)
        print_traceback(error)
    printed = capsys.readouterr().err
    shown = "https://…@mirror/x?a@b, http://…@[::1]:8080 and https://a/b@c; … … …"
    assert printed.count(shown) == 2 and "in test_secrets_are_not_printed" in printed


UNCAUGHT = """
import logging, threading
from fastnabla.utils.console import command_console
command_console()
def fail(*_):
    raise RuntimeError("no answer from https://me:pass@mirror")
thread = threading.Thread(target=fail)
thread.start(), thread.join()
board = {"__module__": "tensorboard.summary.writer.event_file_writer", "run": fail}
thread = type("Writer", (threading.Thread,), board)()
thread.start(), thread.join()
logging.getLogger("fastnabla").warning("no answer from %s", "https://me:pass@mirror")
fail()
"""


@pytest.mark.slow
def test_secrets_are_not_in_warnings_and_tracebacks() -> None:
    ended = subprocess.run([sys.executable, "-c", UNCAUGHT], capture_output=True, text=True)
    lines = ended.stderr.splitlines()
    said = "no answer from https://…@mirror"
    assert ended.returncode == 1 and lines.count(said) == 1 and "pass" not in ended.stderr
    assert lines.count(f"RuntimeError: {said}") == 2, "of a thread and of the program, not of TensorBoard's thread"
