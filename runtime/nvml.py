"""What an NVIDIA driver says of a GPU while it works: energy, clock, limits; nothing where there is no driver."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch


class Nvml:
    """The management library for one CUDA device.

    Parameters
    ----------
    library : module
        `pynvml`.
    handle : object
        Its name for the device.
    """

    def __init__(self, library: ModuleType, handle: Any) -> None:  # noqa: ANN401 - pynvml is untyped
        self.library, self.handle = library, handle

    @staticmethod
    def of(device: torch.device) -> Nvml | None:
        """Return the library for a device; None without a GPU, the library or a driver that answers."""
        if device.type != "cuda":
            return None
        try:
            import pynvml
        except ModuleNotFoundError:
            return None
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return Nvml(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid.encode()))
        except pynvml.NVMLError:
            return None

    def _ask(self, question: str, *arguments: object) -> float | None:
        """Return a number that the driver knows; None where this device does not tell it."""
        try:
            return float(getattr(self.library, question)(self.handle, *arguments))
        except self.library.NVMLError:
            return None

    @property
    def energy_j(self) -> float | None:
        """Energy since the driver was loaded [J]."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules * 1e-3

    @property
    def clock_hz(self) -> float | None:
        """Clock of the cores now [Hz]."""
        megahertz = self._ask("nvmlDeviceGetClockInfo", self.library.NVML_CLOCK_SM)
        return None if megahertz is None else megahertz * 1e6

    @property
    def tdp_w(self) -> float | None:
        """Limit of power as delivered [W]."""
        milliwatts = self._ask("nvmlDeviceGetPowerManagementDefaultLimit")
        return None if milliwatts is None else milliwatts * 1e-3

    @property
    def driver(self) -> str:
        """Version of the driver."""
        text = self.library.nvmlSystemGetDriverVersion()
        return text.decode() if isinstance(text, bytes) else str(text)
