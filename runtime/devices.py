"""Which device of the catalogue a measurement line was taken on, by what the system calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from costmodel.hardware import HardwareProfile, hardware_names, load_hardware

NAMED_BY_DRIVER: Final[Mapping[str, str]] = {
    "Tesla V100-SXM2-32GB": "v100-sxm2-32gb",
    "Tesla T4": "t4-16gb",
    "NVIDIA A10": "a10-24gb",
    "NVIDIA A30": "a30-24gb",
    "NVIDIA A40": "a40-48gb",
    "NVIDIA A100-SXM4-40GB": "a100-sxm4-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-sxm4-80gb",
    "NVIDIA A100 80GB PCIe": "a100-pcie-80gb",
    "NVIDIA A800-SXM4-80GB": "a800-sxm4-80gb",
    "NVIDIA L4": "l4-24gb",
    "NVIDIA L40S": "l40s-48gb",
    "NVIDIA GeForce RTX 3090": "rtx-3090-24gb",
    "NVIDIA GeForce RTX 4090": "rtx-4090-24gb",
    "NVIDIA GeForce RTX 5090": "rtx-5090-32gb",
    "NVIDIA RTX A6000": "rtx-a6000-48gb",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada-48gb",
    "NVIDIA H20": "h20-96gb",
    "NVIDIA H100 80GB HBM3": "h100-sxm5-80gb",
    "NVIDIA H100 PCIe": "h100-pcie-80gb",
    "NVIDIA H100 NVL": "h100-nvl-94gb",
    "NVIDIA H200": "h200-sxm-141gb",
}
"""What nvidia-smi calls devices of the catalogue."""


def device_of(named: str, hardware: str | HardwareProfile | None) -> HardwareProfile | None:
    """Return the device of lines: the one that is given, else the one that they name; None if nobody knows it.

    Parameters
    ----------
    named : str
        What the lines call it: as nvidia-smi does, or by its name in the catalogue.
    hardware : str, HardwareProfile or None
        A device that a person gives.
    """
    if isinstance(hardware, HardwareProfile):
        return hardware
    name = hardware or NAMED_BY_DRIVER.get(named, named)
    return load_hardware(name) if hardware or name in hardware_names() else None


def required(device: HardwareProfile | None, named: str) -> HardwareProfile:
    """Return a device that must be known.

    Raises
    ------
    LookupError
        If it is not.
    """
    if device is None:
        raise LookupError(f"device {named!r} of the lines is none of the catalogue; give one with --hardware")
    return device
