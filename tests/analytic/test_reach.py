"""`python -m fastnabla.analytic.reach`: its plan, its tables, and that finished runs are kept."""

import json

import pytest
import torch
from PIL import Image

from fastnabla.analytic.experiment import Experiment
from fastnabla.analytic.reach import ReachConfig, exact_rows, main
from fastnabla.cost.budget import update_passes

QUICK = ["--dimension=2", "--steps", "10", "--updates=8", "--seeds=2", "--samples=64"]


def test_variants_cost_the_same():
    plan = ReachConfig(updates=320)
    costs, targets = {}, {}
    for variant in plan.variants:
        config = plan.run_config(variant, 50, 1)
        costs[variant] = config.updates * update_passes(config.training())
        targets[variant] = Experiment(config).target.means
        assert (config.steps, config.seed, config.dimension) == (50, 1, 16)
    budget = costs["published"]
    assert all(0.97 * budget < cost <= budget for cost in costs.values()), costs
    assert all(torch.equal(target, targets["published"]) for target in targets.values())
    kinds = {variant: plan.run_config(variant, 50, 0) for variant in plan.variants}
    assert [kinds[name].objective.reverse_target for name in ("published", "reference", "averaged")] == [
        "policy",
        "reference",
        "reference",
    ]
    assert (kinds["averaged"].flow_average, kinds["adjoint"].method, kinds["exact-flow"].exact_flow) == (
        0.95,
        "adjoint",
        True,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_tables_and_continuation(tmp_path, capsys):
    folder = tmp_path / "reach"
    quick = [*QUICK, f"--folder={folder}", "--variants", "reference"]
    assert main(quick) == 0
    names = [line.split(" | ")[0] for line in (folder / "table-10.md").read_text().splitlines()[4:]]
    assert names == ["| pretrained", "| exact score of the target", "| reference", "| exact draws"]
    with Image.open(folder / "curves-10.png") as image:
        assert image.width > 500

    # A finished run is kept, and an unfinished one is trained again.
    records = folder / "reference-10-seed-0" / "evaluations.json"
    edited = json.loads(records.read_text())
    edited[-1]["reward"] = 123.0
    records.write_text(json.dumps(edited))
    (folder / "reference-10-seed-1" / "evaluations.json").unlink()
    assert main([*quick, "adjoint"]) == 0
    table = (folder / "table-10.md").read_text()
    assert "123.00]" in table and "| adjoint | 2 | " in table
    capsys.readouterr()

    # Runs of other settings are not taken for these.
    assert main([*quick, "--samples=128"]) == 2
    assert "reference-10-seed-0 is a run with other settings" in " ".join(capsys.readouterr().err.split())


def test_a_setting_that_does_not_fit_is_an_error(tmp_path, capsys):
    assert main([f"--folder={tmp_path / 'reach'}", "--updates=9"]) == 2
    assert "must be a multiple" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [2, 16])
def test_the_exact_score_samples_the_target_up_to_the_sampler_s_error(dimension):
    """Its mode masses are within 2.5 floors, where the pretrained policy is more than 5 away."""
    config = ReachConfig(dimension=dimension, samples=1024).run_config("published", 100, 0)
    rows = exact_rows(Experiment(config))
    floor = rows["exact draws"]["mode_mass_error"]
    assert rows["exact score of the target"]["mode_mass_error"] < 2.5 * floor
    assert rows["pretrained"]["mode_mass_error"] > 5 * floor
