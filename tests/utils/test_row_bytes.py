import torch

from fastnabla.utils.row_bytes import ROWS, LiveRowBytes
from fastnabla.utils.tensor_bytes import LiveBytes


def use_memory(rows: int) -> None:
    """Most of it is fixed at one time and in proportion to the rows at another."""
    fixed = torch.empty(1000)
    small = torch.empty(rows, 2)
    del fixed
    large = torch.empty(rows, 10)
    del small, large
    torch.empty(rows, 7)


def test_peaks_are_those_of_any_number_of_rows() -> None:
    with LiveRowBytes() as memory:
        use_memory(ROWS)
    peaks = memory.peaks()
    assert [(peak.fixed, peak.each) for peak in peaks] == [(0, 48), (4000, 8)]
    for rows in (1, 10, 99, 100, 101, 1000):
        with LiveBytes() as direct:
            use_memory(rows)
        assert max(peak(rows) for peak in peaks) == direct.peak
