"""Score the committed fits once more, on the raw tables that they were fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from costmodel import load_hardware
from costmodel.efficiency.fitted import FittedCurve, FittedProfile, FittedSize
from costmodel.hardware import HardwareProfile
from runtime.calibrate import read, score
from runtime.tables import Samples
from studies.validation.split import is_test


def rescored(profiles: Sequence[FittedProfile], data: Path) -> list[FittedProfile]:
    """Return the fits whose tables are in a folder, with their errors on the held-out rows there.

    Parameters
    ----------
    profiles : sequence of FittedProfile
        The committed fits; their curves and bands are taken as they are.
    data : Path
        A folder above the measured tables, such as one that holds aiconfigurator/, vidur/ and llmcompass/.

    Raises
    ------
    ValueError
        If no table of any fit is there.
    ModuleNotFoundError
        If the extra `data` is not installed.
    """
    if not data.is_dir():
        raise ValueError(f"--data={str(data)!r} is no folder; give one that holds the measured tables")
    found: list[FittedProfile] = []
    for device in dict.fromkeys(profile.device for profile in profiles):
        own = [profile for profile in profiles if profile.device == device]
        folders = _folders(own, data)
        if folders:
            samples = {(some.library, some.name): some for some in _read(folders, device)}
            found += [_scored(profile, samples, load_hardware(device)) for profile in own]
    scored = [profile for profile in found if profile.curves]
    if not scored:
        names = ", ".join(sorted({name for profile in profiles for name in _names(profile)}))
        raise ValueError(f"--data={str(data)!r} holds none of the tables of the fits; it must hold a folder {names}")
    return scored


def _names(profile: FittedProfile) -> list[str]:
    """Return the names of the folders that a profile was fitted to: the last word of each source."""
    return [source.title.rpartition(", ")[2] for source in profile.sources]


def _folders(profiles: Sequence[FittedProfile], data: Path) -> list[Path]:
    wanted = {name for profile in profiles for name in _names(profile)}
    return sorted(path for path in (data, *data.rglob("*")) if path.name in wanted and path.is_dir())


def _read(folders: Sequence[Path], device: str) -> list[Samples]:
    try:
        return read(folders, device)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"lvlm validate --data needs {error.name}: pip install 'lvlm-sim[data]'") from None


def _scored(
    profile: FittedProfile, samples: dict[tuple[str, str], Samples], hardware: HardwareProfile
) -> FittedProfile:
    curves = [
        _with_errors(curve, samples[key], hardware, profile.seed)
        for curve in profile.curves
        if (key := (profile.library, f"{curve.kind}.{curve.variant}")) in samples
    ]
    return profile.model_copy(update={"curves": tuple(curves)})


def _with_errors(curve: FittedCurve, samples: Samples, hardware: HardwareProfile, seed: int) -> FittedCurve:
    errors = score(hardware, samples, curve, is_test=is_test, seed=seed)
    sizes = [
        FittedSize(up_to=size.up_to, **{key: _known(number) for key, number in asdict(error).items()})
        for size, error in zip(curve.sizes, errors, strict=True)
    ]
    return curve.model_copy(update={"sizes": tuple(sizes)})


def _known(number: Any) -> Any:  # noqa: ANN401 - names, counts and shares
    return None if isinstance(number, float) and math.isnan(number) else number
