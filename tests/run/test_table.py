"""The table of a run's result."""

from fastnabla.metrics.diversity import hue_entropy_ceiling
from fastnabla.metrics.joint_entropy import joint_entropy_ceiling
from fastnabla.run.table import final_table, markdown


def test_joint_entropy_is_a_share_of_its_own_ceiling() -> None:
    records = [{"phase": "evaluate", "update": 0, "reward": 1.0, "joint_entropy": joint_entropy_ceiling(8)}]
    assert "| joint_entropy, share of its ceiling for 8 samples, 0.594 | 100.0% | 100.0% |  |" in markdown(
        final_table(records, 8)
    )


def test_hue_entropy_is_also_a_share_of_its_ceiling() -> None:
    ceiling = hue_entropy_ceiling(8)
    records = [
        {"phase": "evaluate", "update": update, "reward": 1.0, "hue_entropy": share * ceiling}
        for update, share in ((0, 0.9), (3, 0.45))
    ]
    table = markdown(final_table(records, 8))
    assert "| hue_entropy | 0.6207 | 0.3104 | 50% |" in table
    assert "| hue_entropy, share of its ceiling for 8 samples, 0.690 | 90.0% | 45.0% |  |" in table
    assert "ceiling" not in markdown(final_table(records, 1))
    records[1]["hue_entropy"] = None  # not finite
    assert "| 90.0% |  |  |" in markdown(final_table(records, 8))
