"""Fitted curves that a person keeps beside the file of a device of their own."""

from __future__ import annotations

from costmodel.efficiency.fitted import FittedProfile, read_fitted
from costmodel.hardware import HardwareProfile


def fitted_beside(hardware: HardwareProfile) -> tuple[FittedProfile, ...]:
    """Return the fitted curves that lie beside the file of a device: `NAME.<library>.toml` beside `NAME.toml`.

    Raises
    ------
    ValueError
        If such a file holds no curves, or those of another device.
    """
    if hardware.file is None:
        return ()
    found = []
    for path in sorted(hardware.file.parent.glob(f"{hardware.file.stem}.*.toml")):
        profile = read_fitted(path.read_text(encoding="utf-8"), str(path))
        if profile.device != hardware.name.partition(":")[0]:
            raise ValueError(f"{path} has device={profile.device!r}, and lies beside {hardware.name}; move one of them")
        found.append(profile)
    return tuple(found)
