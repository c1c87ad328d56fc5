"""Predictions beside measurements, line by line: how far off they are, and whether inside their band."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from costmodel.base import Array
from costmodel.beside import fitted_beside
from costmodel.efficiency import NcclCurve
from costmodel.efficiency.fitted import CUSTOM, FittedCurve, FittedProfile
from costmodel.engine import EngineProfile, load_engine
from costmodel.errors import Unsupported
from costmodel.fitted_files import load_fitted, load_fitted_texts
from costmodel.hardware import HardwareProfile
from costmodel.models import ModelSpec
from costmodel.operators import Kind
from runtime.devices import device_of, required
from runtime.flat import flat_s
from runtime.lines import CurveName, curve_name, grouped, samples_of
from runtime.measurement import Measurement, ShapeValue
from runtime.recipes import recipe_of
from runtime.stages import DECODE, STAGES, part_s, stage_s

PERCENTILE: Final = 0.9


@dataclass(frozen=True, slots=True)
class Expected:
    """A predicted time, its band [s], and what it is from; without a time, why there is none."""

    source: str
    time_s: float | None = None
    band_s: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One measurement and its prediction.

    Parameters
    ----------
    kind, variant : str
        Stage or kind of kernel, and what tells its curves apart (of a stage, its model or part).
    implementation, precision, device : str
        As the line says; the device under the name of its profile, where it has one.
    shape : mapping
        Of the line.
    measured_s : float
        Median of its samples [s].
    predicted_s : float or None
        None where nothing says what it takes [s].
    low_s, high_s : float or None
        The band of the prediction [s].
    source : str
        The curve or the engine that it is from, or why there is none.
    """

    kind: str
    variant: str
    implementation: str
    precision: str
    device: str
    shape: Mapping[str, ShapeValue]
    measured_s: float
    predicted_s: float | None
    low_s: float | None
    high_s: float | None
    source: str

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        return None if self.predicted_s is None else self.predicted_s / self.measured_s - 1

    @property
    def inside(self) -> bool | None:
        """Whether the measured time lies in the band; None where there is no band."""
        if self.low_s is None or self.high_s is None:
            return None
        return self.low_s <= self.measured_s <= self.high_s


@dataclass(frozen=True, slots=True)
class ComparedGroup:
    """Errors of the rows of one kind, variant, implementation and source.

    Parameters
    ----------
    kind, variant, implementation, source : str
    rows, predicted : int
        Rows, and those with a prediction.
    median, p90 : float or None
        Of |error|.
    bias : float or None
        Median of the signed error.
    coverage : float or None
        Share of the rows with a band that lie inside it.
    """

    kind: str
    variant: str
    implementation: str
    source: str
    rows: int
    predicted: int
    median: float | None
    p90: float | None
    bias: float | None
    coverage: float | None


def compare(
    measurements: Sequence[Measurement],
    model: str | ModelSpec | None = None,
    *,
    hardware: str | HardwareProfile | None = None,
    engine: str | EngineProfile = "fused",
    fitted: Sequence[FittedProfile] = (),
) -> tuple[ComparedRow, ...]:
    """Return predictions beside measurements, in the order of the lines.

    Parameters
    ----------
    measurements : sequence of Measurement
    model : str or ModelSpec, optional
        Of lines of stages that name none.
    hardware : str or HardwareProfile, optional
        The device; by default the one that each line names.
    engine : str or EngineProfile
        What the software adds. Its flat efficiencies stand in where a device and library have no fitted curve; an
        engine without bands, an idealisation, takes no curves.
    fitted : sequence of FittedProfile
        Looked up before those of the catalogue.

    Raises
    ------
    LookupError
        If a device, model or engine is unknown.
    ValueError
        If a line describes no request.
    """
    profile = load_engine(engine) if isinstance(engine, str) else engine
    devices = {line.device: device_of(line.device, hardware) for line in measurements}
    expected: dict[int, Expected] = {}
    for name, rows in grouped(measurements).items():
        for device_name in dict.fromkeys(measurements[i].device for i in rows):
            some = [i for i in rows if measurements[i].device == device_name]
            device = required(devices[device_name], device_name)
            lines = [measurements[i] for i in some]
            expected.update(zip(some, predict_kernels(name, lines, device, profile, fitted), strict=True))
    for i, line in enumerate(measurements):
        if i not in expected:
            expected[i] = _other(line, model, devices[line.device], profile)
    return tuple(_row(line, expected[i], devices[line.device]) for i, line in enumerate(measurements))


def predict_kernels(
    name: CurveName,
    lines: Sequence[Measurement],
    hardware: HardwareProfile,
    engine: EngineProfile,
    fitted: Sequence[FittedProfile] = (),
) -> list[Expected]:
    """Return what kernels of one curve take: under the curve of their library on this device, else flat.

    Parameters
    ----------
    name : CurveName
        Kind, variant and library of all the lines.
    lines : sequence of Measurement
    hardware : HardwareProfile
    engine : EngineProfile
        Without bands, it takes no curves.
    fitted : sequence of FittedProfile
        Looked up before those of the catalogue.
    """
    curve = _curve(name, hardware, fitted) if engine.spread is not None else None
    if curve is None:
        return [_flat(line, hardware, engine) for line in lines]
    samples = samples_of(name, lines)
    custom = name.variant == CUSTOM
    recipe = recipe_of(samples, {})
    option = NcclCurve.model_validate(dict(curve.ring)) if custom else curve.tiling()
    try:
        seconds = recipe.prepare(samples, hardware, option)(curve.curve())
    except Unsupported as error:
        return [Expected(str(error))] * len(lines)
    low, high = _band(curve, samples.work[recipe.size])
    source = f"fitted {name.library}"
    rows = zip(seconds.tolist(), (seconds * (1 + low)).tolist(), (seconds * (1 + high)).tolist(), strict=True)
    return [Expected(source, time_s, (least, most)) for time_s, least, most in rows]


def _curve(name: CurveName, hardware: HardwareProfile, fitted: Sequence[FittedProfile]) -> FittedCurve | None:
    """Return the fitted curve of a library on a device, if there is one."""
    file = f"{hardware.name}.{name.library}"
    packaged = [load_fitted(file)] if file in load_fitted_texts() else []
    for profile in (*fitted, *fitted_beside(hardware), *packaged):
        if (profile.device, profile.library) == (hardware.name, name.library):
            for curve in profile.curves:
                if (curve.kind, curve.variant) == (name.kind, name.variant):
                    return curve
    return None


def _band(curve: FittedCurve, sizes: Array) -> tuple[Array, Array]:
    """Return low and high of the range that each size falls into, the last range having no end."""
    ranges = [size for size in curve.sizes if size.size != "all"]
    ends = [size.up_to for size in ranges if size.up_to is not None]
    chosen = np.searchsorted(ends, sizes)
    return np.array([size.low for size in ranges])[chosen], np.array([size.high for size in ranges])[chosen]


def _flat(line: Measurement, hardware: HardwareProfile, engine: EngineProfile) -> Expected:
    try:
        time_s, kind = flat_s(line, hardware, engine)
    except Unsupported as error:
        return Expected(str(error))
    source = f"engine {engine.name}" if kind is not None else hardware.name
    return Expected(source, time_s, _flat_band(time_s, kind, engine))


def _flat_band(time_s: float, kind: Kind | None, engine: EngineProfile) -> tuple[float, float] | None:
    efficiency = None if kind is None else engine.kind(kind)
    if efficiency is None or efficiency.low is None or efficiency.high is None:
        return None
    return time_s * (1 + efficiency.low), time_s * (1 + efficiency.high)


def _other(
    line: Measurement, model: str | ModelSpec | None, device: HardwareProfile | None, engine: EngineProfile
) -> Expected:
    """Return what a stage, a copy, a launch or a kernel without a curve takes."""
    if line.kind == "technique":
        return Expected("a technique alone is not predicted")
    if line.kind not in {*STAGES, DECODE}:
        return _flat(line, required(device, line.device), engine)
    try:
        is_part = line.kind == "preprocess" and "part" in line.shape
        found = part_s(line, engine) if is_part else stage_s(line, model, required(device, line.device), engine)
    except Unsupported as error:
        return Expected(str(error))
    return Expected(f"engine {engine.name}", found.time_s, found.band_s)


def _row(line: Measurement, expected: Expected, device: HardwareProfile | None) -> ComparedRow:
    low_s, high_s = expected.band_s or (None, None)
    return ComparedRow(
        kind=line.kind,
        variant=_variant(line),
        implementation=line.implementation,
        precision=line.precision,
        device=device.name if device else line.device,
        shape=line.shape,
        measured_s=line.median_s,
        predicted_s=expected.time_s,
        low_s=low_s,
        high_s=high_s,
        source=expected.source,
    )


def _variant(line: Measurement) -> str:
    name = curve_name(line)
    if name is not None:
        return name.variant
    keys = ("part", "model", "direction", "kind")
    return next((str(line.shape[key]) for key in keys if key in line.shape), line.precision)


def groups(rows: Iterable[ComparedRow]) -> tuple[ComparedGroup, ...]:
    """Return the errors by kind, variant, implementation and source, in the order of their first rows."""
    found: dict[tuple[str, str, str, str], list[ComparedRow]] = {}
    for row in rows:
        found.setdefault((row.kind, row.variant, row.implementation, row.source), []).append(row)
    return tuple(_group(key, some) for key, some in found.items())


def _group(key: tuple[str, str, str, str], rows: Sequence[ComparedRow]) -> ComparedGroup:
    signed = np.array([row.error for row in rows if row.error is not None])
    inside = [row.inside for row in rows if row.inside is not None]
    return ComparedGroup(
        *key,
        rows=len(rows),
        predicted=len(signed),
        median=float(np.median(np.abs(signed))) if signed.size else None,
        p90=float(np.quantile(np.abs(signed), PERCENTILE)) if signed.size else None,
        bias=float(np.median(signed)) if signed.size else None,
        coverage=sum(inside) / len(inside) if inside else None,
    )
