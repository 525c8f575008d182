"""The benchmarks of a whole step: they run at toy size, their tables say what they should, and what they compare is the same."""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import agreement, rows, whole_step
from bench.agreement import (
    FLOAT64_LIMIT,
    KERNELS_LIMIT,
    check,
    difference,
    distance,
    network_pass,
    toy_gradients,
    verdict,
)
from bench.models import MODELS, TOY, Model
from bench.profiled_step import Marks, by_kernel, idle_share, watch
from bench.variants import ROWS, Variant, decisive, full, one_by_one
from bench.whole_step import HEADER, main, markdown
from bench.workload import Workload
from tests.bench.toy import ONE_LEVEL

CPU = torch.device("cpu")
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}
"""Pooled text embeddings of width 24 and six size conditions."""


COMPILED = "these, draw=runs, reverse_fraction=0.5, UNet compiled"
SOME = ("published", "fastnabla: fewer passes", "these, reward_gradient=terminal", COMPILED)


def measured(path: Path, names: tuple[str, ...]) -> dict:
    """What is written to `path` of the rows called `names`, for a model of one level. Compiling returns what it is given."""
    some = [variant for variant in one_by_one(cuda=False) if variant.name in names]
    assert len(some) == len(names)
    options = ["--model", "toy", "--device", "cpu", "--budget-seconds", "600", "--rounds", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "toy", lambda: ONE_LEVEL)
        patch.setitem(ROWS, "one-by-one", lambda cuda: some)
        patch.setattr(torch, "compile", lambda function, **options: function)
        main([*options, "--transitions", "6", "--micro-batch", "6", "--json", str(path)])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def agreement_on_one_level() -> Iterator[None]:
    """Gradients are compared on the smallest model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "toy_gradients", functools.partial(toy_gradients, model=ONE_LEVEL))
        patch.setattr(agreement, "published_gradients", functools.cache(agreement.published_gradients.__wrapped__))
        yield


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, agreement_on_one_level: None) -> dict:
    return measured(tmp_path_factory.mktemp("bench") / "step.json", SOME)


@pytest.mark.slow
def test_gradients_were_compared(result: dict) -> None:
    found = {row["name"]: row.get("gradient difference") for row in result["rows"]}
    assert found["published"] is None and found["these, reward_gradient=terminal"] is None
    assert found["fastnabla: fewer passes"] < FLOAT64_LIMIT


@pytest.mark.slow
def test_rows_have_the_passes_of_the_plan(result: dict) -> None:
    """Five inner transitions and a last one. The peak of compiled code is not known on a CPU."""
    found = {row["name"]: row for row in result["rows"]}
    assert found.keys() == set(SOME) and all("note" not in row for row in found.values())
    assert found["published"]["U"] == 8
    assert found["these, reward_gradient=terminal"]["U"] == pytest.approx((5 * 5 + 3) / 6)
    assert found["fastnabla: fewer passes"]["U"] == pytest.approx((5 * 7 + 3) / 6)
    assert all(row["s"] > 0 for row in found.values())
    assert found.pop(COMPILED)["peak GiB"] is None
    assert all(row["peak GiB"] > 0 for row in found.values())


@pytest.mark.slow
def test_markdown_has_all_columns(result: dict) -> None:
    assert f"| {' | '.join(HEADER)} |" in markdown(result)


@pytest.mark.slow
def test_a_row_that_fails_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It is written with its reason, beside the others, and the exit status tells."""
    spoilt, broken = "fastnabla: fewer passes", "these, reward_gradient=terminal"
    step = Workload.step

    def failing(self: Workload, variant: Variant, *arguments):
        if variant.name == broken:
            raise RuntimeError("made to fail")
        return step(self, variant, *arguments)

    monkeypatch.setattr(Workload, "step", failing)
    monkeypatch.setattr(agreement, "toy_gradients", lambda *_: [torch.tensor([float("nan")])])
    monkeypatch.setattr(agreement, "published_gradients", lambda *_: [torch.ones(1)])
    monkeypatch.setattr(whole_step, "peak_and_seconds", lambda *_: (0.1, 0.2))
    path = tmp_path / "step.json"
    with pytest.raises(SystemExit, match=broken):
        measured(path, ("published", spoilt, broken))
    found = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert found[broken]["note"] == "RuntimeError: made to fail" and "s" not in found[broken]
    assert "GRADIENTS DIFFER" in found[spoilt]["note"] and found[spoilt]["s"] > 0 and "note" not in found["published"]


@pytest.mark.slow
def test_rows_are_published_one_by_one_until_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rows.DEADLINE, str(time.time() - 1))
    path = tmp_path / "step.json"
    main(["--model", "toy", "--device", "cpu", "--json", str(path), "--transitions", "6"])
    result = json.loads(path.read_text())
    assert not result["rows"] and result["not run"] == [*(v.name for v in one_by_one(cuda=False)), "rollout"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("these, channels-last", dataclasses.replace(ONE_LEVEL, unet=ONE_LEVEL.unet | XL)),
        ("these, draw=runs", ONE_LEVEL),
    ],
    ids=["XL, channels-last", "runs"],
)
def test_gradients_are_the_published_algorithms(name: str, model: Model) -> None:
    """In float64, to 1e-12 as measured: what they differ by in float32 is rounding. Both have all optimisations."""
    variant = next(variant for variant in one_by_one(cuda=False) if variant.name == name)
    assert variant.ours and variant.lora and variant.lean
    published = Variant(name="published", ours=False, draw=variant.draw)
    expected = toy_gradients(published, CPU, torch.float64, model)
    assert all(gradient.norm() > 0 for gradient in expected)
    assert difference(toy_gradients(variant, CPU, torch.float64, model), expected) < FLOAT64_LIMIT


@pytest.mark.slow
@pytest.mark.usefixtures("agreement_on_one_level")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU")
def test_the_gate_of_the_kernels() -> None:
    variant = dataclasses.replace(full(cuda=False), kernels=True)
    found = check(variant, CPU)
    assert FLOAT64_LIMIT < found["gradient difference"] < KERNELS_LIMIT and "note" not in found
    assert check(dataclasses.replace(variant, reward="tf32"), CPU) == {}


def test_decisive_rows_change_one_thing_each() -> None:
    baseline, ours, *others = decisive(cuda=True)
    assert not baseline.ours and ours.kernels and ours.decoder_channels_last
    for other in others:
        changed = [f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(other, f.name)]
        assert len(changed) == 2 and "name" in changed


@pytest.mark.parametrize(
    ("step", "passed", "begins"),
    [
        ([[1.0, 2.0], [9.0]], [1.01, 2.0], "agree"),
        ([[0.0, 0.0], [9.0]], [1.0, 2.0], "WRONG: 1 of 2 tensors are 0"),
        ([[1.0, 2.0], [float("inf")]], [1.0, 2.0], "WRONG: not finite"),
        ([[1.0, 2.0], [9.0]], [1.5, 2.0], "WRONG: LoRA"),
        ([[1.0, 2.0], [9.0]], [float("nan"), 2.0], "WRONG: LoRA"),
    ],
)
def test_wrong_gradients_are_told(step: list[list[float]], passed: list[float], begins: str) -> None:
    """A step's may be far apart, but not 0; a pass may be off by three times its halves' rounding."""
    steps = [[torch.tensor(values) for values in lists] for lists in (step, [[1.0, 2.0], [3.0]])]
    passes = [{"output": [torch.ones(1)], "LoRA": [torch.tensor(v)]} for v in (passed, [1.0, 2.0], [1.02, 2.0])]
    assert verdict(*steps, *passes)["gradients"].startswith(begins)


@pytest.mark.slow
def test_a_pass_in_parts_is_the_whole() -> None:
    workload, variant = Workload(TOY, TOY.pixels, CPU, torch.float64), full(cuda=False)
    batch = workload.transitions(6, variant.draw, 6)
    whole, parts = (network_pass(workload, variant, batch, size) for size in (6, 4))
    assert whole.keys() == parts.keys() and all(any(tensor.any() for tensor in whole[name]) for name in whole)
    assert all(distance(parts[name], whole[name]) < 1e-10 for name in whole)


@pytest.mark.slow
def test_split_charges_each_pass_to_its_network() -> None:
    """A network's layer is made slow, forward and backward; the time shows in its phase alone."""
    workload, variant = Workload(TOY, TOY.pixels, CPU, torch.float32), full(cuda=False)
    run, _, policy = workload.step(variant, 6, 6)
    decoder, delay = workload.decoder(variant), 0.02
    calls = dict.fromkeys(("UNet", "decode", "reward"), 0)

    def slow(phase: str, output: torch.Tensor) -> torch.Tensor:
        def wait(*_) -> None:
            time.sleep(delay)
            calls[phase] += 1

        wait()
        if output.requires_grad:
            output.register_hook(wait)
        return output

    policy.network.mid_block.register_forward_hook(lambda module, arguments, output: slow("UNet", output))
    # Its layers' weights are taken without a call of theirs, but attention is called.
    decoder.vae.decoder.mid_block.attentions[0].register_forward_hook(lambda m, a, output: slow("decode", output))
    reward = workload.reward(variant)
    reward.net.register_forward_hook(lambda module, arguments, output: slow("reward", output))
    marks = Marks(cuda=False)
    watch(marks, policy, decoder)
    marks("rest")
    run()
    marks("rest")
    seconds = marks.seconds()
    assert all(calls.values())
    assert all(seconds[phase] >= delay * number for phase, number in calls.items())
    assert sum(seconds.values()) == pytest.approx(marks.marks[-1][1] - marks.marks[0][1])
    workload.batches.clear()


def test_idle_share_and_kernels() -> None:
    """Kernels of two streams overlap; nothing runs from 30 to 40."""
    events = [("a", 0, 20), ("b", 10, 20), ("a", 12, 3), ("c", 40, 60)]
    events = [{"name": name, "ts": start, "dur": duration} for name, start, duration in events]
    assert idle_share(events) == pytest.approx(0.1)
    assert by_kernel(events) == [("c", 60, 1), ("a", 23, 2), ("b", 20, 1)]
