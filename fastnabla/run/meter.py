"""Telemetry of the GPU during a run: power, utilisation, memory, and energy per transition.

The numbers come from the driver through NVML (package nvidia-ml-py), which does not synchronise with the CUDA stream. A reading
describes the moment at which the host takes it, and the host may be ahead of the GPU.
"""

import contextlib
import dataclasses
import time
from types import ModuleType
from typing import Any

import torch

GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True)
class _Meter:
    """A reading of the clock, the power, and the energy counter (None if the device has none)."""

    seconds: float
    watts: float
    joules: float | None

    def joules_since(self, before: "_Meter") -> float:
        if self.joules is not None and before.joules is not None:
            return self.joules - before.joules
        return (self.watts + before.watts) / 2 * (self.seconds - before.seconds)


class GpuMeter:
    """Reads one CUDA device.

    All readings are empty, without a warning, on a CPU, without nvidia-ml-py, or if NVML does not start or does not know the
    device (a MIG slice).

    Args:
        device: torch's. NVML finds it by its UUID, because CUDA_VISIBLE_DEVICES renumbers devices for CUDA only.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._nvml: ModuleType | None = None
        self._handle: Any = None
        self._last: _Meter | None = None
        self._transitions = 0

    def start(self) -> None:
        """Open the device. The first reading's energy counts from here."""
        if self.device.type != "cuda" or not torch.cuda.is_available():
            return
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return
        self._nvml, self._transitions = pynvml, 0
        try:
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(self.device).uuid}")
            self._last = self._meter()
        except pynvml.NVMLError:
            self.close()

    def read(self, transitions: int) -> dict[str, float]:
        """Read the device. Empty if it does not answer.

        Args:
            transitions: trained on since the last call. If a reading fails, its transitions and energy count towards the next.

        Returns:
            gpu_power_watts: power of the whole board. Averaged over 1 s on Ampere and later; instantaneous on the A100 and on
                older GPUs (NVML's documentation of nvmlDeviceGetPowerUsage).
            gpu_utilisation: fraction, 0 to 1, of the driver's last sampling period (1/6 to 1 s) in which a kernel ran.
            gpu_memory_gib: in use on the device, by all processes and the driver.
            gpu_peak_allocated_gib: peak of this process's tensors, since its start or the last
                `torch.cuda.reset_peak_memory_stats`.
            energy_joules_per_transition: the board's energy since the last reading, for any work, over `transitions`. Absent
                if `transitions` is 0. From the driver's counter (Volta and later); else from the mean power of both readings
                times the time between them, which is rough if they are far apart.
        """
        if self._nvml is None:
            return {}
        self._transitions += transitions
        try:
            now = self._meter()
            used = self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used
            busy = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
        except self._nvml.NVMLError:
            return {}
        reading = {
            "gpu_power_watts": now.watts,
            "gpu_utilisation": busy / 100,
            "gpu_memory_gib": used / GIB,
            "gpu_peak_allocated_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
        }
        if self._transitions:
            reading["energy_joules_per_transition"] = now.joules_since(self._last) / self._transitions
        self._last, self._transitions = now, 0
        return reading

    def close(self) -> None:
        """Close the device. Later readings are empty."""
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
            self._nvml = None

    def _meter(self) -> _Meter:
        watts = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
        try:
            joules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        except self._nvml.NVMLError_NotSupported:
            joules = None
        return _Meter(time.perf_counter(), watts, joules)
