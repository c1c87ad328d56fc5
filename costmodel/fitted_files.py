"""The files of fitted curves, and which measured device stands for another."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Final

from costmodel.efficiency.fitted import FittedProfile, read_fitted
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.packaged import packaged_texts

SHARED: Final = "shared"
"""Stands for the device in the name of files whose curves were fitted to all measured devices."""


@functools.cache
def load_fitted_texts() -> Mapping[str, str]:
    """Return the text of every fitted file by `<device>.<library>`."""
    return packaged_texts("hardware_profiles", "fitted", suffix=".toml")


@functools.cache
def load_fitted(name: str) -> FittedProfile:
    """Return a fitted file by `<device>.<library>`."""
    return read_fitted(load_fitted_texts()[name], name)


@functools.cache
def _load_measured_chips() -> tuple[tuple[str, HardwareProfile], ...]:
    """Return the devices that have fitted files, with their profiles."""
    names = {name.partition(".")[0] for name in load_fitted_texts()} - {SHARED}
    return tuple((name, load_hardware(name)) for name in sorted(names))


def measured_as(hardware: HardwareProfile) -> str:
    """Return the device whose measurements describe this one's chip: itself, or one with the same cores; else `shared`.

    Constants are shares of a device's own rates, so a sibling with other memory, or a what-if, keeps them.
    """
    base = hardware.name.partition(":")[0]
    chips = _load_measured_chips()
    if any(name == base for name, _ in chips):
        return base
    key = (hardware.generation, hardware.core_count, hardware.clock_hz)
    same = (name for name, one in chips if (one.generation, one.core_count, one.clock_hz) == key)
    return next(same, SHARED)
