"""Dollars of a request."""

from __future__ import annotations

from costmodel.hardware import HardwareProfile


def cost_usd(hardware: HardwareProfile, *, device_seconds: float) -> float | None:
    """Return the list price of this many device seconds [USD], None where the device has no public price."""
    if hardware.price_usd_per_s is None:
        return None
    return hardware.price_usd_per_s * device_seconds
