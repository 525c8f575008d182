"""The GPU meter, on a made-up driver: units, differences, and silence where there is nothing to read."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from fastnabla.run.meter import GIB, GpuMeter

UUID = "5a3c2b10-0000-1111-2222-333344445555"
CUDA = torch.device("cuda", 1)


class NVMLError(Exception):
    pass


class NVMLErrorNotSupported(NVMLError):
    pass


class FakeDriver:
    """The part of `pynvml` that is used, with one GPU; functions named in `broken` raise."""

    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLErrorNotSupported

    def __init__(self) -> None:
        self.milliwatts, self.millijoules, self.open = 250_000, 9_000_000, 0
        self.broken: dict[str, type[Exception]] = {}

    def __getattribute__(self, name: str):
        if name.startswith("nvml") and name in self.broken:
            raise self.broken[name]
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise NVMLError("not found")
        return "handle"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        assert handle == "handle"
        return self.milliwatts

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        return self.millijoules

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        assert handle == "handle"
        return SimpleNamespace(total=80 * GIB, free=74 * GIB, used=6 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        assert handle == "handle"
        return SimpleNamespace(gpu=75, memory=40)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A machine with two GPUs in torch's order, the second of them the driver's."""
    driver = FakeDriver()
    uuids = {0: "another", 1: UUID}
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=uuids[d.index]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: {0: 0, 1: 3 * GIB}[d.index])
    return driver


def started(device: torch.device = CUDA) -> GpuMeter:
    meter = GpuMeter(device)
    meter.start()
    return meter


def test_units_and_the_energy_since_the_last_reading(driver: FakeDriver) -> None:
    meter = started()
    driver.millijoules += 600_000
    driver.milliwatts = 310_500
    assert meter.read(transitions=40) == {
        "gpu_power_watts": 310.5,
        "gpu_utilisation": 0.75,
        "gpu_memory_gib": 6.0,
        "gpu_peak_allocated_gib": 3.0,
        "energy_joules_per_transition": 15.0,
    }
    driver.millijoules += 100_000
    assert meter.read(transitions=10)["energy_joules_per_transition"] == 10.0


def test_energy_of_work_without_transitions_is_charged_to_none(driver: FakeDriver) -> None:
    meter = started()
    driver.millijoules += 600_000
    assert "energy_joules_per_transition" not in meter.read(transitions=0)
    driver.millijoules += 50_000
    assert meter.read(transitions=10)["energy_joules_per_transition"] == 5.0


def test_without_a_counter_energy_is_the_mean_power_times_the_time(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    driver.broken["nvmlDeviceGetTotalEnergyConsumption"] = NVMLErrorNotSupported
    meter = started()
    now, driver.milliwatts = 104.0, 350_000
    assert meter.read(transitions=10)["energy_joules_per_transition"] == (250 + 350) / 2 * 4 / 10
    now = 105.0
    assert meter.read(transitions=10)["energy_joules_per_transition"] == 350 / 10


@pytest.mark.parametrize(
    "function",
    [
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetTotalEnergyConsumption",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetUtilizationRates",
    ],
)
def test_a_reading_that_fails_is_empty_and_its_share_goes_to_the_next(driver: FakeDriver, function: str) -> None:
    meter = started()
    driver.broken[function] = NVMLError
    driver.millijoules += 300_000
    assert meter.read(transitions=20) == {}
    driver.broken.clear()
    driver.millijoules += 300_000
    assert meter.read(transitions=10)["energy_joules_per_transition"] == 20.0


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetPowerUsage"])
def test_a_driver_that_does_not_start_gives_nothing_and_is_let_go(driver: FakeDriver, function: str) -> None:
    driver.broken[function] = NVMLError
    meter = started()
    driver.broken.clear()
    assert meter.read(transitions=1) == {}
    assert driver.open == 0


def test_a_device_that_the_driver_does_not_know_gives_nothing(driver: FakeDriver) -> None:
    assert started(torch.device("cuda", 0)).read(transitions=1) == {}
    assert driver.open == 0


def test_a_cpu_and_a_missing_package_give_nothing(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(torch.device("cpu")).read(transitions=1) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert started().read(transitions=1) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert started().read(transitions=1) == {}


@pytest.mark.parametrize("broken", [{}, {"nvmlShutdown": NVMLError}])
def test_a_closed_meter_reads_nothing(driver: FakeDriver, broken: dict[str, type[Exception]]) -> None:
    meter = started()
    assert meter.read(transitions=1) and driver.open == 1
    driver.broken = broken
    meter.close()
    meter.close()
    assert meter.read(transitions=1) == {}
    assert driver.open == len(broken)


def test_the_names_are_those_of_the_package() -> None:
    """What the made-up driver stands for exists."""
    import pynvml

    assert issubclass(pynvml.NVMLError_NotSupported, pynvml.NVMLError)
    assert not [name for name in dir(FakeDriver) if name.startswith(("nvml", "NVML")) and not hasattr(pynvml, name)]


@pytest.mark.gpu
def test_a_real_gpu_uses_energy() -> None:
    meter = started(torch.device("cuda", torch.cuda.current_device()))
    square = torch.randn(8192, 8192, device="cuda")
    for _ in range(50):
        square @ square
    torch.cuda.synchronize()
    reading = meter.read(transitions=1)
    meter.close()
    assert 0 < reading["gpu_peak_allocated_gib"] <= reading["gpu_memory_gib"] < 1000
    assert 10 < reading["gpu_power_watts"] < 2000
    assert 0 <= reading["gpu_utilisation"] <= 1
    assert reading["energy_joules_per_transition"] > 1
