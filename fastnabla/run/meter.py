"""What the GPU does during a run, as its driver counts it: power, utilisation, memory, and the energy of a transition.

The numbers come through NVML (the package nvidia-ml-py), which asks the driver and neither waits for the CUDA stream
nor adds to it: a reading is of the moment at which the host makes it, and the host may be ahead of the GPU.
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
    """A reading of the clock, the power, and the counter of energy (None where the device has none)."""

    seconds: float
    watts: float
    joules: float | None

    def joules_since(self, before: "_Meter") -> float:
        if self.joules is not None and before.joules is not None:
            return self.joules - before.joules
        return (self.watts + before.watts) / 2 * (self.seconds - before.seconds)


class GpuMeter:
    """Readings of one CUDA device, and of nothing where there is none.

    On a CPU, without nvidia-ml-py, where NVML does not start or does not know the device (a MIG slice), all readings
    are empty: a run is never stopped, nor its terminal filled, for want of them.

    Args:
        device: as torch names it. NVML finds it by its UUID, since CUDA_VISIBLE_DEVICES renumbers only CUDA's devices.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._nvml: ModuleType | None = None
        self._handle: Any = None
        self._last: _Meter | None = None
        self._transitions = 0

    def start(self) -> None:
        """Open the device; the first reading's energy counts from here."""
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
        """The device now, and its energy since the last reading; empty if it does not answer.

        Args:
            transitions: trained on since the last call. Those before a reading that failed count to the next, with
                their energy.

        Returns:
            gpu_power_watts: of the whole board; the driver's average over 1 s on Ampere and later, of the instant on
                the A100 and on GPUs before (NVML's documentation of nvmlDeviceGetPowerUsage).
            gpu_utilisation: share, 0 to 1, of the driver's last sampling period (1/6 to 1 s) in which a kernel ran.
            gpu_memory_gib: in use on the device, by all processes and the driver.
            gpu_peak_allocated_gib: most that this process's tensors took, since its start or the last
                `torch.cuda.reset_peak_memory_stats`.
            energy_joules_per_transition: all that the board used since the last reading, for whatever work, over
                `transitions`; left out where they are 0. From the driver's counter (Volta and later), else the mean of
                the powers at both readings times the time between, which is rough where they are far apart.
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
        """Let go of the device; readings are empty from then on."""
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
